"""The demo compares runs that saw the same: others end in a sentence that names the step."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bilora_diffusion.demo import require_paired
from bilora_diffusion.errors import TrainingError
from examples import own_loop


def run(folder: Path, digests: Sequence[str]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": n, "digest": d}) for n, d in enumerate(digests, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize(("other", "step"), [("xyz", None), ("xyw", 3), ("xy", 3), ("xyzx", 4)])
def test_only_runs_of_equal_digests_are_compared(tmp_path, other, step):
    pair = [run(tmp_path / "a", "xyz"), run(tmp_path / "b", other)]
    if step is None:
        assert require_paired(pair) == 3
    else:
        with pytest.raises(TrainingError, match=f"step {step}"):
            require_paired(pair)


@pytest.mark.slow
def test_the_plain_loop_takes_its_steps(capsys):
    own_loop.main(["--steps", "1"])
    head, *curves = capsys.readouterr().out.splitlines()[-3:]
    assert head.endswith("at 0")
    assert [line.split()[-1] for line in curves] == [curves[0].split()[-1]] * 2
