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
REFUSED = "refused"
BEGINS = "begins"
RESUMES = "resumes"
DRY = "dry"
TRAINS = (BEGINS, RESUMES)
# By the folder's state; one outcome for each of STARTS, in their order.
OUTCOMES = {
    "empty": (BEGINS, REFUSED, BEGINS, BEGINS, REFUSED, BEGINS, DRY),
    "begun run": (REFUSED, REFUSED, BEGINS, REFUSED, REFUSED, REFUSED, DRY),
    "interrupted run": (REFUSED, RESUMES, RESUMES, REFUSED, REFUSED, REFUSED, DRY),
    "finished run": (REFUSED, RESUMES, RESUMES, REFUSED, REFUSED, REFUSED, DRY),
    "interrupted search": (REFUSED, REFUSED, REFUSED, RESUMES, RESUMES, RESUMES, DRY),
    "interrupted last run": (REFUSED, REFUSED, REFUSED, RESUMES, RESUMES, RESUMES, DRY),
    "finished fit": (REFUSED, REFUSED, REFUSED, REFUSED, RESUMES, RESUMES, DRY),
}
# Ctrl-C in which call of which function brings a run into the state.
INTERRUPTIONS: dict[str, tuple[Any, str, int]] = {
    "begun run": (Trainer, "train_step", 1),
    "interrupted run": (Trainer, "train_step", 2),
    "interrupted search": (Trainer, "train_step", 3),
    "interrupted last run": (setup, "export", 1),
}
# States of a search, and the run from whose folder one is made where nothing is trained in it.
CHEAP_RUNS = {
    "interrupted search": "begun run",
    "interrupted last run": "interrupted run",
    "finished fit": "finished run",
}


def settings(fit: bool) -> dict[str, Any]:
    """Options of a short run, or of a short search."""
    values = {**material("classification"), **SETTINGS}
    if not fit:
        return values
    space = make_once("space.yaml", lambda path: path.write_text("rank: [2]\n"))
    return {**values, "fit": True, "fit_space": space, "fit_folds": 2, "fit_budget": 4}


def make(state: str, folder: Path) -> None:
    """Bring a run or a search to a state."""
    values = settings(fit=state in CHEAP_RUNS)
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


def put(state: str, folder: Path, trains: bool) -> None:
    """Make a folder in a state. Where nothing is trained, a search is only looked at."""
    if state == "empty":
        return
    if trains or state not in CHEAP_RUNS:
        copied(example(state), folder)
        return
    copied(example(CHEAP_RUNS[state]), folder)
    copied(example("finished run"), folder / "fit" / "lora")
    (folder / "fit.json").write_text("{}")


def cases() -> list[Any]:
    """All pairs; those that train are slow."""
    pairs = []
    for state, outcomes in OUTCOMES.items():
        for start, outcome in zip(STARTS, outcomes, strict=True):
            marks = [pytest.mark.slow] if outcome in TRAINS else []
            pairs.append(pytest.param(state, start, outcome, marks=marks, id=f"{state}, {start}"))
    return pairs


@pytest.mark.parametrize(("state", "start", "outcome"), cases())
def test_a_start_loses_nothing(state, start, outcome, tmp_path, capsys):
    folder = tmp_path / "run"
    put(state, folder, trains=outcome in TRAINS)
    before = file_contents(folder)
    fit = start.startswith("fit")
    capsys.readouterr()

    code = train_text_bilora.main(text_flags(folder, **settings(fit), **STARTS[start]))

    output = capsys.readouterr().err
    after = file_contents(folder)
    if outcome == REFUSED:
        assert code == 2
        assert str(folder) in error_sentence(output)
    else:
        assert code == 0
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
