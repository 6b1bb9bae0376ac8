"""Every way to start a run, in every state of its folder: no file is lost, errors are sentences."""

from pathlib import Path
from typing import Any

import pytest

import train_text_bilora
from bilora_diffusion.run import runlog
from bilora_diffusion.train.trainer import Trainer
from tests.scripts.runs import copied, error_sentence, file_contents, make_once
from tests.text.text_builders import material, text_flags, train_text

SETTINGS: dict[str, Any] = {
    "method": "lora",
    "lr_scheduler": "constant",
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 0,
}
STARTS: dict[str, dict[str, Any]] = {
    "run": {},
    "run latest": {"resume_from_checkpoint": "latest"},
    "run auto": {"resume_from_checkpoint": "auto"},
    "overwrite": {"overwrite_output_dir": True},
    "dry run": {"dry_run": True},
}
BEGINS = "begins"
RESUMES = "resumes"
DRY = "dry"
TRAINS = (BEGINS, RESUMES)
# Every other outcome is a refusal, given by words of its message.
NO_CHECKPOINT = "checkpoint 'latest' does not exist"
UNSAVED_RUN = "holds this run, interrupted before its first checkpoint"
SAVED_RUN = "holds this run, interrupted and saved up to step 1 of 2"
DONE_RUN = "holds this run, which is finished"
# State of the folder -> outcome of each of STARTS, in the same order
OUTCOMES = {
    "empty": (BEGINS, NO_CHECKPOINT, BEGINS, BEGINS, DRY),
    "begun run": (UNSAVED_RUN, NO_CHECKPOINT, BEGINS, BEGINS, DRY),
    "interrupted run": (SAVED_RUN, RESUMES, RESUMES, BEGINS, DRY),
    "finished run": (DONE_RUN, RESUMES, RESUMES, BEGINS, DRY),
}
# State of the folder -> step in which Ctrl-C leads to it
INTERRUPTIONS = {"begun run": 1, "interrupted run": 2}


def settings() -> dict[str, Any]:
    """Return the options of a short run."""
    return {**material("classification"), **SETTINGS}


def make(state: str, folder: Path) -> None:
    """Create a run folder in a state."""
    values = settings()
    if state not in INTERRUPTIONS:
        train_text(folder, **values)
        return
    train_step = Trainer.train_step
    calls = 0

    def train_step_or_interrupt(*arguments):
        nonlocal calls
        calls += 1
        if calls == INTERRUPTIONS[state]:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step_or_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_text(folder, **values)


def example(state: str) -> Path:
    """Return a shared folder in a state; tests must copy it."""
    return make_once("run", lambda folder: make(state, folder), "folders", state)


def cases() -> list[Any]:
    """Return all pairs of a state and a start, and mark those that train as slow."""
    pairs = []
    for state, outcomes in OUTCOMES.items():
        for start, outcome in zip(STARTS, outcomes, strict=True):
            marks = [pytest.mark.slow] if outcome in TRAINS else []
            pairs.append(pytest.param(state, start, outcome, marks=marks, id=f"{state}, {start}"))
    return pairs


@pytest.mark.parametrize(("state", "start", "outcome"), cases())
def test_starting_a_run_loses_nothing(state, start, outcome, tmp_path, capsys):
    folder = tmp_path / "run"
    if state != "empty":
        copied(example(state), folder)
    before = file_contents(folder)
    capsys.readouterr()

    exit_code = train_text_bilora.main(text_flags(folder, **settings(), **STARTS[start]))

    output = capsys.readouterr().err
    after = file_contents(folder)
    if outcome == DRY or outcome in TRAINS:
        assert exit_code == 0
    else:
        assert exit_code == 2
        sentence = error_sentence(output)
        assert str(folder) in sentence
        assert outcome in sentence
    if outcome not in TRAINS:
        assert after == before
        assert folder.exists() == (state != "empty")
        return

    assert runlog.read_run(folder)["status"] == "finished"
    assert bool(runlog.read_run(folder)["resumed"]) == (outcome == RESUMES)
    if start == "overwrite":
        return
    for name, content in before.items():
        assert name in after
        if "checkpoints/" in name:
            assert after[name] == content
