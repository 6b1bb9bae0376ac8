"""Runs of scripts in the process of the tests."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _fresh_precision() -> None:
    """Let a script choose its own precision: accelerate keeps one for a whole process."""
    AcceleratorState._reset_state()
