"""--fit from the command line: one process, killed and gone on with, and what it leaves."""

import os
import signal
from typing import Any

import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import runlog
from bilora_diffusion.run.record import read_search
from bilora_diffusion.train.loop import Trainer
from tests.scripts.runs import column, difference
from tests.text.text_builders import heldout, material, rows_for, train_text, write_rows

FIT = {"max_train_steps": 6, "validation_loss_steps": 2, "lr_scheduler": "constant"}


@pytest.fixture
def given(tmp_path):
    """A classifier of 24 rows, a space of two methods, and a schedule that is not typed."""
    (tmp_path / "space.yaml").write_text("method: [lora, bilora]\nauxiliaries: sample\n")
    (tmp_path / "recipe.yaml").write_text("lr_scheduler: constant\n")
    fit = {"fit": True, "fit_space": tmp_path / "space.yaml", "fit_budget": 36, "fit_folds": 2}
    fit |= {"config": tmp_path / "recipe.yaml", "lr_scheduler": None}
    return {**material("classification"), **FIT, **fit}


def record(folder) -> Any:
    return read_search(folder / "fit.json")


def interrupt(monkeypatch, *at):
    """Ctrl-C in these steps of all that are taken; returns the list of those."""
    taken, step = list[int](), Trainer.train_step

    def interrupted(self, batches):
        taken.append(self.step)
        if len(taken) in at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    return taken


@pytest.mark.slow
def test_a_fit_goes_on_where_it_was_interrupted_and_trains_what_it_chose(
    tmp_path, given, monkeypatch
):
    whole = train_text(tmp_path / "whole", **given)
    found = record(whole)
    choice, spent = found["choice"], found["spent"]
    assert spent <= 36
    assert {run["fold"] for run in found["runs"] if run["title"] == choice["title"]} == {1, 2}
    assert not list(whole.glob("fit/*/checkpoints"))
    assert (whole / "fit.png").stat().st_size > 5_000
    assert "](fit.png)" in (whole / "README.md").read_text()
    results, length = runlog.read_run(whole)["results"], 2 * choice["steps"]
    assert (results["chosen_steps"], results["steps"]) == (choice["steps"], length)
    card = (whole / "README.md").read_text()
    assert f"{choice['steps']} at a constant rate, trained as {length}" in card

    # The last run is what a command with these options makes.
    own = {**given, **choice["options"], "max_train_steps": length, "lr_scheduler": "linear"}
    no_fit = dict.fromkeys(("fit", "fit_space", "fit_budget", "fit_folds"))
    assert difference(whole, train_text(tmp_path / "plain", **{**own, **no_fit})) == 0

    # Each part begins with models that no run had before: the same bytes, and no step twice.
    taken = interrupt(monkeypatch, 3, 12, spent + 1)
    parts = tmp_path / "parts"
    for where in ("fit/", "fit/", f"of {length},"):
        with pytest.raises(KeyboardInterrupt, match=where):
            train_text(parts, **given)
    with pytest.raises(UserError, match="learning_rate was"):
        train_text(parts, **given, learning_rate=3e-2)
    train_text(parts, **given)
    assert len(taken) == spent + length
    assert {**record(parts), "settings": 0} == {**found, "settings": 0}
    assert difference(whole, parts) == 0
    for run in found["runs"]:
        for name in ("loss", "digest", "heldout_loss"):
            one, two = (column(folder / "fit" / run["name"], name) for folder in (whole, parts))
            assert one == two
    with pytest.raises(UserError, match="holds a finished --fit"):
        train_text(parts, **given)


def test_a_run_of_a_search_is_that_of_its_own_command(tmp_path):
    """With a held-out set in place of folds, and without a word about overfitting at the end."""
    (tmp_path / "space.yaml").write_text("method: [bilora, lora]\n")
    given = {**material("classification"), **FIT, "validation_file": heldout("classification")}
    fit = train_text(tmp_path / "fit", **given, fit=True, fit_space=tmp_path / "space.yaml",
                     fit_budget=12)  # fmt: skip
    found = record(fit)
    assert [run["title"] for run in found["runs"]] == ["bilora", "lora"]
    length = found["runs"][1]["steps"][-1]
    plain = train_text(tmp_path / "plain", **given, method="lora")
    for name in ("loss", "digest"):
        assert column(fit / "fit" / "lora", name) == column(plain, name)[:length]
    held = [row for row in runlog.read_metrics(plain) if "heldout_loss" in row]
    losses = [row["heldout_loss"] for row in held if row["step"] <= length]
    assert found["runs"][1]["losses"] == pytest.approx(losses, rel=1e-12)


def test_a_search_under_the_scripts_own_warm_up_compares_two_methods(tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("method: [lora, bilora]\nrho: [auto]\n")
    own_schedule = {"lr_scheduler": None, "warmup_ratio": None}
    given = {**material("classification"), **FIT, **own_schedule, "max_train_steps": 12}
    given |= {"validation_file": heldout("classification"), "validation_loss_steps": 3}
    fit = train_text(tmp_path / "fit", **given, fit=True, fit_space=space, fit_budget=36)
    lora, bilora = (fit / "fit" / name for name in ("lora", "bilora_auto"))
    rates = column(bilora, "lr")
    assert rates[0] == 0 < rates[1]
    assert max(column(bilora, "auxiliary_norm")) > 0
    assert column(lora, "digest") == column(bilora, "digest")
    assert column(lora, "loss") != column(bilora, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["probe", "train_step"])
def test_a_run_that_does_not_fit_the_memory_leaves_the_others_as_they_are(
    place, tmp_path, given, monkeypatch
):
    """An error in the first pass is a sentence about the model by then, one in a step is not."""
    function = getattr(Trainer, place)

    def in_memory(self, *batches):
        if self.cfg.rank == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(self, *batches)

    monkeypatch.setattr(Trainer, place, in_memory)
    space = tmp_path / "space.yaml"
    values = {**given, "method": "lora", "rank": None, "fit_budget": 12}
    space.write_text("rank: [8, 4]\n")
    fit = record(train_text(tmp_path / "both", **values))
    assert [run["title"] for run in fit["runs"]] == ["rank 4", "rank 4"]
    assert list(fit["out"]) == ["rank 8"]
    space.write_text("rank: [4]\n")
    alone = record(train_text(tmp_path / "alone", **values))
    assert fit["runs"] == alone["runs"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"fit_folds": 25}, "rank: [4]", "25 folds of 24 rows"),
    ({"fit_space": "nowhere.yaml"}, "", "nowhere.yaml"),
    ({}, "rank: [0]", "in a run of --fit, --rank is 0"),
    ({}, "method: [lora-sam]\nrho: [auto]", "only bilora can follow"),
]


@pytest.mark.parametrize(("values", "space", "words"), BAD)
def test_what_cannot_be_searched_is_one_sentence(tmp_path, given, values, space, words):
    (tmp_path / "space.yaml").write_text(space)
    with pytest.raises(UserError, match=words) as refused:
        train_text(tmp_path / "run", **{**given, **values})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_search_on_other_data_is_refused(tmp_path, monkeypatch):
    kind = "classification"
    (tmp_path / "space.yaml").write_text("method: [bilora, lora]\n")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train_file", "validation_file")}
    rows, held = rows_for(kind, 8), rows_for(kind, 8, 24)
    write_rows(files["train_file"], rows)
    write_rows(files["validation_file"], held)
    given = {**material(kind), **FIT, **files, "validation_part": "1/2", "fit": True}
    given |= {"fit_space": tmp_path / "space.yaml", "fit_budget": 12}
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="fit/"):
            train_text(folder, **given)
    with pytest.raises(UserError, match='validation_part was "1/2" and is "2/2"'):
        train_text(folder, **{**given, "validation_part": "2/2"})
    edits = (("train_file", rows[1:], "training"), ("validation_file", held[::-1], "held-out"))
    for option, edited, words in edits:
        before = files[option].read_text()
        write_rows(files[option], edited)
        with pytest.raises(UserError, match=f"in the {words} data"):
            train_text(folder, **given)
        files[option].write_text(before)
    train_text(folder, **given)
    assert record(folder)["choice"]
