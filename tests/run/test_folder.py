"""Which output folders are refused, what a fresh start deletes; refusing changes nothing."""

import os
from pathlib import Path

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run.folder import clear, guard, refuse_unusable
from bilora_diffusion.run.runlog import RunLog
from tests.run.recorded_runs import save
from tests.scripts.runs import file_contents


def start(folder):
    log = RunLog(folder)
    log.start({}, method="lora", seed=0, resume_step=None)
    return log


def refused(*parts, folder, resume=None, overwrite=False):
    """The folder is refused by a sentence that has these parts."""
    with pytest.raises(UserError) as error:
        guard(folder, resume, overwrite=overwrite)
    for part in parts:
        assert str(part) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "README.md",
        "validation/mine.png",
        "run.safetensors",
        "checkpoints/step-1",
        "run.comfy.json",
        "run.comfy.json/mine",
    ],
)
def test_what_no_run_has_written_is_refused(tmp_path, name):
    run = tmp_path / "run"
    path = run / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    before = file_contents(tmp_path)
    for overwrite in (False, True):
        refused(run / Path(name).parts[0], "--output_dir", folder=run, overwrite=overwrite)
    assert file_contents(tmp_path) == before


def test_a_card_is_replaced_only_by_the_run_that_wrote_it(tmp_path):
    log = start(tmp_path)
    save(tmp_path, 5)
    card = tmp_path / "README.md"
    card.write_text("mine")
    refused(card, folder=tmp_path, resume="latest")
    refused(card, folder=tmp_path, overwrite=True)
    log.record_card()
    guard(tmp_path, "latest")
    RunLog(tmp_path).start({}, method="lora", seed=0, resume_step=5)  # its mark stays
    guard(tmp_path, "latest")
    guard(tmp_path, None, overwrite=True)


def test_a_fresh_start_deletes_the_earlier_run_only(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "photo.png").write_bytes(b"mine")
    clear(tmp_path, overwrite=True)
    log = start(tmp_path)
    log.record_card()
    log.close("finished")
    (tmp_path / "README.md").write_text("the finished run's card")
    save(tmp_path, 1)
    (tmp_path / "validation").mkdir()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"old")
    clear(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["photo.png"]


def test_files_and_folders_without_rights_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "run"):
        with pytest.raises(UserError, match=f"{file} is a file.*--output_dir"):
            refuse_unusable(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{tmp_path} .*not writable.*--output_dir"):
        refuse_unusable(tmp_path / "run")


def test_without_overwriting_neither_checkpoints_nor_a_search_are_deleted(tmp_path):
    start(tmp_path).metric(1, loss=1.0)
    checkpoint = save(tmp_path, 1)
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit.json").touch()
    clear(tmp_path, overwrite=False)
    for path in (checkpoint, tmp_path / "fit", tmp_path / "fit.json", tmp_path / "run.json"):
        assert path.exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_is_resumed_lies_in_the_folder(tmp_path):
    run = tmp_path / "run"
    other_run = tmp_path / "other"
    start(run).close("finished")
    refused("a finished run without a checkpoint", folder=run, resume="latest")
    path = save(run, 5)
    for value in ("step-5", path, str(path)):
        assert guard(run, value) == path
    assert guard(other_run, path) == path
    start(other_run).close("finished")
    save(other_run, 1)
    refused(other_run, path, "--output_dir", folder=other_run, resume=path)
    # A run of a search is not the run of its folder.
    refused(run / "fit", folder=run, resume=save(run / "fit" / "lora"))


def test_checkpoints_whose_record_is_lost_are_resumed_and_else_kept(tmp_path):
    path = save(tmp_path, 5)
    assert guard(tmp_path, "auto") == path
    for overwrite in (False, True):
        refused(tmp_path, "--resume_from_checkpoint latest", folder=tmp_path, overwrite=overwrite)
    (tmp_path / "run.json").write_text("{")
    refused("run.json", folder=tmp_path, resume="latest")
