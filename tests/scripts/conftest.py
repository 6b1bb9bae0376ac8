"""Fixtures for tests that run scripts in the process of the tests."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _fresh_precision() -> None:
    """Reset accelerate's precision, which otherwise stays the same for the whole process."""
    AcceleratorState._reset_state()
