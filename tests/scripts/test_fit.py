"""--fit from the command line: one process, killed and gone on with, and what it leaves."""

import os
import signal
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import runlog
from bilora_diffusion.run.record import read_fit
from bilora_diffusion.train.trainer import Trainer
from tests.scripts.runs import column, difference
from tests.text.text_builders import heldout, material, train_text

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
    return read_fit(folder / "fit.json")


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
    assert results["chosen_steps"] == results["steps"] == length

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
