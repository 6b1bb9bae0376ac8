"""The demo compares runs that saw the same: others end in a sentence that names the step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bilora_diffusion.errors import TrainingError
from examples.demo import require_paired


def run(folder: Path, digests: Sequence[str]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": n, "digest": d}) for n, d in enumerate(digests, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_equal_digests_are_counted(tmp_path: Path) -> None:
    assert require_paired([run(tmp_path / "a", "xyz"), run(tmp_path / "b", "xyz")]) == 3


@pytest.mark.parametrize("other", ["xyw", "xy", "xyzx"])
def test_other_digests_and_other_lengths_are_refused(tmp_path: Path, other: str) -> None:
    step = 4 if len(other) > 3 else 3
    with pytest.raises(TrainingError, match=f"step {step}"):
        require_paired([run(tmp_path / "a", "xyz"), run(tmp_path / "b", other)])
