"""Which output folders are refused; refusing changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.runlog import RunLog, guard


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
        "README.md",
        "validation/mine.png",
        "logs/events",
        "adapter_config.json",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",  # of versions before files were named after runs
        "run.safetensors",
        "checkpoints/step-1",
    ],
)
def test_guard_refuses_what_no_run_has_written(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    before = files(folder)
    first = folder / Path(name).parts[0]
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"{first} was not written by a run.*--output_dir"):
            guard(folder, None, overwrite)
    assert files(folder) == before


def test_guard_refuses_another_run(tmp_path: Path) -> None:
    start(tmp_path)
    before = files(tmp_path)
    with pytest.raises(
        UserError, match=f"^{tmp_path} holds another run: give another --output_dir"
    ):
        guard(tmp_path, None, False)
    guard(tmp_path, None, True)
    assert files(tmp_path) == before


def test_a_card_is_replaced_only_by_the_run_that_wrote_it(tmp_path: Path) -> None:
    log = start(tmp_path)
    save(tmp_path, 5)
    card = tmp_path / "README.md"
    card.write_text("mine")
    for resume, overwrite in (("latest", False), (None, True)):
        with pytest.raises(UserError, match=rf"^{card} was not written by a run"):
            guard(tmp_path, resume, overwrite)
    start(tmp_path).fail("x")  # without the guard it is left alone
    assert card.read_text() == "mine"
    log.writes_card()
    card.write_text("the run's")
    save(tmp_path, 5)
    guard(tmp_path, "latest", False)
    RunLog(tmp_path).start({}, method="lora", seed=0, resume_step=5)  # its mark stays
    guard(tmp_path, "latest", False)
    guard(tmp_path, None, True)
    start(tmp_path)
    assert not card.exists()


@pytest.mark.parametrize(
    "folder",
    ["/", "/etc", "/usr", "/usr/share/run", "/proc/run", "/home", "/tmp", str(Path.home())],
)
def test_guard_refuses_folders_of_the_system(folder: str) -> None:
    with pytest.raises(UserError, match=f"^--output_dir {folder} is .*give a new folder"):
        guard(Path(folder), None, False)


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
