"""A disk that fills up, at each of the writers: one sentence, and the run goes on from it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import TrainingError
from bilora_diffusion.image import script
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.run import checkpoint, runlog, snapshots
from tests.scripts.runs import difference, train

SHORT = {
    **{"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 1},
    **{"validation_prompt": "a TOK icon", "num_validation_images": 1},
    **{"log_dynamics": True, "dynamics_steps": 1},
}
WRITERS: list[tuple[Any, str, int, int]] = [
    (runlog.RunLog, "metric", 3, 2),
    (snapshots, "write", 2, 2),
    (DreamBooth, "validate", 1, 2),
    (checkpoint, "save", 1, 2),
    (script, "save_diffusers", 1, 4),
]
"""Who writes, the call of his at which the disk is full, and the step of the last checkpoint."""


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


@contextmanager
def full_at(disk: Path, owner: Any, writer: str, call: int) -> Iterator[None]:
    """Fills the disk right before that call of a writer."""
    write, calls = getattr(owner, writer), []

    def after_filling(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            fill(disk)
        return write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, writer, after_filling)
        yield
    (disk / "filler").unlink()


@pytest.mark.slow
def test_a_run_goes_on_whenever_there_is_room_again(tmp_path, disk):
    whole, folder = train(tmp_path / "whole", **SHORT), disk / "run"
    resume: dict[str, Any] = {}
    for owner, writer, call, kept in WRITERS:
        full = pytest.raises(TrainingError, match=rf"{folder} is full \(0 bytes.* make about ")
        with full_at(disk, owner, writer, call), full:
            train(folder, **SHORT, **resume)
        assert runlog.read_run(folder)["status"] == "failed"
        assert checkpoint.steps(folder)[-1] == kept
        assert checkpoint.load(folder / "checkpoints" / f"step-{kept}").step == kept
        resume = {"resume_from_checkpoint": "latest"}
    train(folder, **SHORT, **resume)
    assert runlog.read_run(folder)["status"] == "finished"
    assert difference(whole, folder) == 0
    assert not list(folder.rglob(".*"))
