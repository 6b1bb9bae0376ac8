"""A disk that fills up, at each of the writers: one sentence, and the run goes on from it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import TrainingError
from bilora_diffusion.image import script as train
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.run import checkpoint, runlog, snapshots
from tests.scripts.runs import difference

SHORT = {
    **{"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 1},
    **{"validation_prompt": "a TOK icon", "num_validation_images": 1},
    **{"log_dynamics": True, "dynamics_steps": 1},
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("making a small disk needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "writer", "call", "kept"),
    [
        (runlog.RunLog, "metric", 3, 2),
        (snapshots, "write", 4, 2),  # the first is of step 0
        (DreamBooth, "validate", 1, 2),
        (checkpoint, "save", 2, 2),
        (train, "save_diffusers", 1, 4),
    ],
    ids=["metrics", "dynamics", "validation", "checkpoint", "export"],
)
def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(
    train: Callable[..., Path],
    tmp_path: Path,
    disk: Path,
    owner: Any,
    writer: str,
    call: int,
    kept: int,
) -> None:
    whole = train(tmp_path / "whole", **SHORT)
    folder, write, calls = disk / "run", getattr(owner, writer), []

    def after_filling(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            fill(disk)
        return write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, writer, after_filling)
        with pytest.raises(TrainingError, match=rf"{folder} is full \(0 bytes.* make about .* go"):
            train(folder, **SHORT)
    record = runlog.read_run(folder)
    assert record["status"] == "failed"
    assert checkpoint.steps(folder)[-1] == kept
    assert checkpoint.load(folder / "checkpoints" / f"step-{kept}").step == kept
    (disk / "filler").unlink()
    train(folder, **SHORT, resume_from_checkpoint="latest")
    assert runlog.read_run(folder)["status"] == "finished"
    assert difference(whole, folder) == 0
    assert not list(folder.rglob(".*"))
