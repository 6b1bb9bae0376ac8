"""Every kind of start in every state of its folder: nothing is lost, refusals are one sentence."""

from pathlib import Path
from typing import Any

import pytest

import train_text_bilora
from bilora_diffusion.run import runlog
from bilora_diffusion.run.record import read_search
from bilora_diffusion.train import setup
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
    "fit": {},
    "fit latest": {"resume_from_checkpoint": "latest"},
    "fit auto": {"resume_from_checkpoint": "auto"},
    "dry run": {"dry_run": True},
}
BEGINS = "begins"
RESUMES = "resumes"
DRY = "dry"
TRAINS = (BEGINS, RESUMES)
# Every other outcome is a refusal, by its reason.
NO_CHECKPOINT = "checkpoint 'latest' does not exist"
NO_SEARCH = "holds no search to go on with"
UNSAVED_RUN = "holds this run, interrupted before its first checkpoint"
SAVED_RUN = "holds this run, interrupted and saved up to step 1 of 2"
DONE_RUN = "holds this run, finished"
NO_FIT = "holds a run without a search"
OPEN_FIT = "holds an interrupted --fit"
DONE_FIT = "holds a finished --fit"
# By the folder's state; one outcome for each of STARTS, in their order.
OUTCOMES = {
    "empty": (BEGINS, NO_CHECKPOINT, BEGINS, BEGINS, NO_SEARCH, BEGINS, DRY),
    "begun run": (UNSAVED_RUN, NO_CHECKPOINT, BEGINS, NO_FIT, NO_FIT, NO_FIT, DRY),
    "interrupted run": (SAVED_RUN, RESUMES, RESUMES, NO_FIT, NO_FIT, NO_FIT, DRY),
    "finished run": (DONE_RUN, RESUMES, RESUMES, NO_FIT, NO_FIT, NO_FIT, DRY),
    "interrupted search": (OPEN_FIT, OPEN_FIT, OPEN_FIT, RESUMES, RESUMES, RESUMES, DRY),
    "interrupted last run": (OPEN_FIT, OPEN_FIT, OPEN_FIT, RESUMES, RESUMES, RESUMES, DRY),
    "finished fit": (DONE_FIT, DONE_FIT, DONE_FIT, DONE_FIT, RESUMES, RESUMES, DRY),
}
# Ctrl-C in which call of which function brings a run into the state.
INTERRUPTIONS: dict[str, tuple[Any, str, int]] = {
    "begun run": (Trainer, "train_step", 1),
    "interrupted run": (Trainer, "train_step", 2),
    "interrupted search": (Trainer, "train_step", 3),
    "interrupted last run": (setup, "write_card", 1),
}
SEARCHES = ("interrupted search", "interrupted last run", "finished fit")
# States that take more than three seconds to make
SLOW_STATES = ("interrupted last run", "finished fit")


def settings(fit: bool) -> dict[str, Any]:
    """Options of a short run, or of a short search."""
    values = {**material("classification"), **SETTINGS}
    if not fit:
        return values
    space = make_once("space.yaml", lambda path: path.write_text("rank: [2]\n"))
    return {**values, "fit": True, "fit_space": space, "fit_folds": 2, "fit_budget": 4}


def make(state: str, folder: Path) -> None:
    """Bring a run or a search to a state."""
    values = settings(fit=state in SEARCHES)
    if state not in INTERRUPTIONS:
        train_text(folder, **values)
        return
    owner, name, last_call = INTERRUPTIONS[state]
    function = getattr(owner, name)
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == last_call:
            raise KeyboardInterrupt
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_text(folder, **values)


def example(state: str) -> Path:
    """A folder in a state, to be copied."""
    return make_once("run", lambda folder: make(state, folder), "folders", state)


def cases() -> list[Any]:
    """All pairs; those that train, or need a state that takes long to make, are slow."""
    pairs = []
    for state, outcomes in OUTCOMES.items():
        for start, outcome in zip(STARTS, outcomes, strict=True):
            is_slow = outcome in TRAINS or state in SLOW_STATES
            marks = [pytest.mark.slow] if is_slow else []
            pairs.append(pytest.param(state, start, outcome, marks=marks, id=f"{state}, {start}"))
    return pairs


@pytest.mark.parametrize(("state", "start", "outcome"), cases())
def test_a_start_loses_nothing(state, start, outcome, tmp_path, capsys):
    folder = tmp_path / "run"
    if state != "empty":
        copied(example(state), folder)
    before = file_contents(folder)
    fit = start.startswith("fit")
    capsys.readouterr()

    code = train_text_bilora.main(text_flags(folder, **settings(fit), **STARTS[start]))

    output = capsys.readouterr().err
    after = file_contents(folder)
    if outcome == DRY or outcome in TRAINS:
        assert code == 0
    else:
        assert code == 2
        sentence = error_sentence(output)
        assert str(folder) in sentence
        assert outcome in sentence
    if outcome not in TRAINS:
        assert after == before
        assert folder.exists() == (state != "empty")
        return

    assert runlog.read_run(folder)["status"] == "finished"
    from_checkpoint = outcome == RESUMES and state != "interrupted search"
    assert bool(runlog.read_run(folder)["resumed"]) == from_checkpoint
    for name, content in before.items():
        if name.startswith("fit/") and "/checkpoints/" in name:
            continue  # a search deletes its runs' checkpoints at its end
        assert name in after
        if "checkpoints/" in name:
            assert after[name] == content
    if fit:
        record: Any = read_search(folder / "fit.json")
        assert record["choice"] is not None
    if state == "interrupted search":
        # No step is taken twice.
        rows = runlog.read_metrics(folder / "fit" / "2_fold1")
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == sorted(set(steps))
