"""Output folders: which are refused, without any change, and which files a new run deletes."""

import os
import shutil
from pathlib import Path

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run.checkpoint import load, steps
from bilora_diffusion.run.folder import clear, guard, refuse_unusable, rewind
from bilora_diffusion.run.runlog import RunLog, read_metrics, read_run
from tests.run.recorded_runs import save
from tests.run.test_checkpoint import Crash, crash_at
from tests.scripts.runs import file_contents


def start(folder):
    log = RunLog(folder)
    log.start({}, method="lora", seed=0, resume_step=None)
    return log


def refused(*parts, folder, resume=None, overwrite=False, settings=None):
    """Check that the folder is refused with an error message that has these parts."""
    with pytest.raises(UserError) as error:
        guard(folder, resume, overwrite=overwrite, settings=settings)
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
def test_a_folder_with_files_that_no_run_wrote_is_refused(tmp_path, name):
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
    RunLog(tmp_path).start({}, method="lora", seed=0, resume_step=5)  # keeps the card's mark
    guard(tmp_path, "latest")
    guard(tmp_path, None, overwrite=True)


def test_a_fresh_start_deletes_only_the_earlier_run(tmp_path):
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


def test_a_file_or_an_unwritable_folder_is_refused_as_output_folder(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "run"):
        with pytest.raises(UserError, match=f"{file} is a file.*--output_dir"):
            refuse_unusable(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{tmp_path} .*not writable.*--output_dir"):
        refuse_unusable(tmp_path / "run")


def test_no_checkpoints_are_deleted_without_overwriting(tmp_path):
    start(tmp_path).metric(1, loss=1.0)
    checkpoint = save(tmp_path, 1)
    clear(tmp_path, overwrite=False)
    assert checkpoint.exists()
    assert (tmp_path / "run.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_is_resumed_only_in_its_own_or_a_new_folder(tmp_path):
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
    # A run in a subfolder is not the folder's run.
    refused(run / "below", folder=run, resume=save(run / "below" / "lora"))


def test_checkpoints_without_a_record_can_be_resumed_but_not_overwritten(tmp_path):
    path = save(tmp_path, 5)
    assert guard(tmp_path, "auto") == path
    for overwrite in (False, True):
        refused(tmp_path, "--resume_from_checkpoint auto", folder=tmp_path, overwrite=overwrite)
    (tmp_path / "run.json").write_text("{")
    refused("run.json", folder=tmp_path, resume="latest")


def test_the_message_names_the_same_run_or_the_options_that_differ(tmp_path):
    settings = {"rank": 4, "betas": [0.9, 0.99]}
    log = RunLog(tmp_path)
    config = {**settings, "betas": (0.9, 0.99), "output_dir": "x"}
    log.start(config, "lora", 0, None, num_steps=500)
    same_run = f"{tmp_path} holds this run, "
    auto = "--resume_from_checkpoint auto"
    refused(f"{same_run}interrupted before", auto, folder=tmp_path, settings=settings)
    save(tmp_path, 100)
    save(tmp_path, 200)
    log.close("interrupted")
    words = "interrupted and saved up to step 200 of 500: "
    refused(same_run + words, auto, "--overwrite", folder=tmp_path, settings=settings)
    log.start(config, "lora", 0, 200, num_steps=500)
    log.close("failed", "a loss is not finite")
    refused(f"{same_run}failed and saved", folder=tmp_path, settings=settings)
    difference = "holds another run (rank was 4 and is 8)"
    refused(difference, auto, folder=tmp_path, settings={**settings, "rank": 8})
    log.start(config, "lora", 0, 200, num_steps=500)
    log.close("finished")
    refused(f"{same_run}which is finished", auto, folder=tmp_path, settings=settings)


def finished_run(folder):
    """Write a finished run of four steps, each with a checkpoint, an export and images."""
    log = start(folder)
    for step in range(1, 5):
        log.metric(step, loss=step / 2)
        save(folder, step, step)
        for name in ("exports", "validation"):
            (folder / name / f"step-{step}").mkdir(parents=True)
    log.record_removed_checkpoints([0, 3])
    log.close("finished")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"of step 4")
    (folder / "photo.png").write_bytes(b"mine")
    return folder


def test_an_earlier_checkpoint_is_resumed_only_if_later_steps_may_be_deleted(tmp_path):
    run = finished_run(tmp_path / "run")
    before = file_contents(run)
    for value in ("step-2", run / "checkpoints" / "step-2"):
        later = f"{run} holds checkpoints later than step-2 (step-3, step-4)"
        refused(later, "auto", "--overwrite_output_dir", folder=run, resume=value)
        assert guard(run, value, overwrite=True) == run / "checkpoints" / "step-2"
    assert guard(run, "step-4") == guard(run, "auto") == run / "checkpoints" / "step-4"
    assert file_contents(run) == before

    rewind(run, 2)
    log = RunLog(run)
    log.start({}, method="lora", seed=0, resume_step=2)
    for name in ("checkpoints", "exports", "validation"):
        assert sorted(path.name for path in (run / name).iterdir()) == ["step-1", "step-2"]
    assert sorted(path.name for path in run.iterdir() if path.is_file()) == [
        "metrics.jsonl",
        "photo.png",
        "run.json",
    ]
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    assert read_run(run)["removed_checkpoints"] == [0]


@pytest.mark.slow
def test_a_crash_while_later_steps_are_deleted_leaves_a_run_that_can_be_resumed(tmp_path):
    newest_steps = set()
    for call in range(1, 100):  # until there are fewer changes than ``call``
        run = finished_run(tmp_path / str(call))
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, call)
            try:
                rewind(run, 2)
                RunLog(run).start({}, method="lora", seed=0, resume_step=2)
                is_complete = True
            except Crash:
                is_complete = False
        for value in ("auto", "step-2"):
            parts = Path(shutil.copytree(run, tmp_path / f"{call} {value}"))
            chosen = guard(parts, value, overwrite=value != "auto")
            assert chosen is not None
            step = load(chosen).step
            if value == "auto":
                newest_steps.add(step)
            else:
                rewind(parts, step)
            RunLog(parts).start({}, method="lora", seed=0, resume_step=step)
            # The log has each step up to the chosen checkpoint, and no later step.
            assert [row["step"] for row in read_metrics(parts)] == list(range(1, step + 1))
            assert steps(parts)[-1] == step
            # A run that is recorded as finished has its weights.
            weights = run / "pytorch_lora_weights.safetensors"
            assert weights.exists() or read_run(run)["status"] != "finished"
        if is_complete:
            break
    assert is_complete
    assert call > 10
    assert newest_steps == {2, 3, 4}
