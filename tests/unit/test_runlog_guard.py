"""Which output folders are refused; refusing changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bilora_diffusion import checkpoint
from bilora_diffusion.errors import UserError
from bilora_diffusion.runlog import RunLog, guard


def start(folder: Path) -> RunLog:
    log = RunLog(folder)
    log.start({}, method="lora", seed=0, resume_step=None)
    return log


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(
        folder, step, tensors={}, optimizer={}, scheduler={}, scaler=None, extra={}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_guard_lets_new_folders_and_foreign_files_be(tmp_path: Path) -> None:
    guard(tmp_path / "a" / "b", None, False)
    guard(tmp_path / "a" / "b", "auto", False)
    assert not (tmp_path / "a").exists()
    (tmp_path / "notes.txt").write_text("x")
    guard(tmp_path, None, False)


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "metrics.jsonl",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",  # of versions before files were named after runs
        "checkpoints/step-1",
    ],
)
def test_guard_refuses_another_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    before = files(tmp_path)
    with pytest.raises(
        UserError, match=f"^{tmp_path} holds another run: give another --output_dir"
    ):
        guard(tmp_path, None, False)
    guard(tmp_path, None, True)
    assert files(tmp_path) == before


def test_guard_refuses_a_file_that_is_named_after_the_run(tmp_path: Path) -> None:
    (tmp_path / f"{tmp_path.name}.safetensors").write_text("x")
    with pytest.raises(UserError, match="give another --output_dir"):
        guard(tmp_path, None, False)


def test_guard_refuses_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "run"):
        with pytest.raises(UserError, match=f"^{file} is a file"):
            guard(folder, None, True)
    with pytest.raises(UserError, match="is a file"):
        start(file)


def test_guard_refuses_a_folder_without_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"^{tmp_path} is not writable"):
        guard(tmp_path / "run", None, False)


def test_guard_and_resume(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    log = start(run)
    guard(run, "auto", False)  # killed before its first checkpoint
    with pytest.raises(UserError, match="no checkpoint"):
        guard(run, "latest", False)
    log.finish()
    with pytest.raises(UserError, match="holds a finished run without a checkpoint"):
        guard(run, "auto", False)
    path = save(run, 5)
    for value in ("auto", "latest", "step-5", path, str(path)):
        guard(run, value, False)
        with pytest.raises(UserError, match="give one of the two"):
            guard(run, value, True)
    guard(other, path, False)
    start(other).finish()
    with pytest.raises(UserError, match=f"^{other} holds another run than checkpoint {path}"):
        guard(other, path, False)
