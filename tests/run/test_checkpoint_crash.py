"""Checkpoints survive a crash at any moment: the old one or the new one is there, whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import TrainingError
from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import latest, load, resolve
from tests.run.checkpoints import load_latest, save


class Crash(BaseException):
    """The moment the machine stops: nothing after it reaches the disk."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the ``call``-th change of the disk, and all after it, not happen."""
    count = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= call:
                raise Crash
            return real(*args, **kwargs)

        return change

    for module, name in (
        (os, "mkdir"),
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (shutil, "copymode"),
        (checkpoint, "save_file"),
    ):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))


@pytest.mark.parametrize("earlier", [1, 2], ids=["new step", "same step"])
def test_a_crash_at_every_change_leaves_the_old_or_the_new(tmp_path: Path, earlier: int) -> None:
    outcomes = set()
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, earlier, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, call)
            try:
                save(folder, 2, 2.0)
            except Crash:
                completed = False
            else:
                completed = True
        found = load_latest(folder)
        outcomes.add(found.extra["value"])
        assert resolve(folder, f"step-{found.step}") == latest(folder)
        root = folder / checkpoint.CHECKPOINTS
        if load(root / f"step-{found.step}").extra["value"] == 1.0:
            assert not completed
        save(folder, 3, 3.0)  # cleans up
        assert {path.name for path in root.iterdir()} <= {"step-1", "step-2", "step-3"}
        assert load_latest(folder).extra["value"] == 3.0
        if completed:
            break
    assert completed
    assert call > 10
    assert outcomes == {1.0, 2.0}


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 1.0)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(TrainingError, match=r"step-2 could not be written \(No space left"):
            save(tmp_path, 2)
    assert os.listdir(tmp_path / checkpoint.CHECKPOINTS) == ["step-1"]
    assert load_latest(tmp_path).extra == {"value": 1.0}
