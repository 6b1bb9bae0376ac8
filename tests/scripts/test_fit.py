"""--fit from the command line: one process, killed and gone on with, and what it leaves."""

from typing import Any

import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import runlog
from bilora_diffusion.run.record import read_search
from bilora_diffusion.train.trainer import Trainer
from tests.scripts.runs import column, difference, interrupt
from tests.text.text_builders import heldout, material, rows_for, train_text, write_rows

FIT = {"max_train_steps": 6, "validation_loss_steps": 2, "lr_scheduler": "constant"}


@pytest.fixture
def flags(tmp_path):
    """A classifier of 24 rows, a space of two methods, and a schedule that is not typed."""
    (tmp_path / "space.yaml").write_text("method: [lora, bilora]\nauxiliaries: sample\n")
    (tmp_path / "recipe.yaml").write_text("lr_scheduler: constant\n")
    return {
        **material("classification"),
        **FIT,
        "fit": True,
        "fit_space": tmp_path / "space.yaml",
        "fit_budget": 36,
        "fit_folds": 2,
        "config": tmp_path / "recipe.yaml",
        "lr_scheduler": None,
    }


def record(folder) -> Any:
    return read_search(folder / "fit.json")


@pytest.mark.slow
def test_a_fit_goes_on_where_it_was_interrupted_and_trains_what_it_chose(
    tmp_path, flags, monkeypatch
):
    fit_run = train_text(tmp_path / "fit", **flags)
    fit_record = record(fit_run)
    choice = fit_record["choice"]
    spent = fit_record["spent"]
    assert spent <= 36
    assert {run["fold"] for run in fit_record["runs"] if run["title"] == choice["title"]} == {1, 2}
    assert not list(fit_run.glob("fit/*/checkpoints"))
    assert (fit_run / "fit.png").stat().st_size > 5_000
    # The last run has twice the steps, at a rate that falls to zero.
    length = 2 * choice["steps"]
    results = runlog.read_run(fit_run)["results"]
    assert results["chosen_steps"] == choice["steps"]
    assert results["steps"] == length
    card = (fit_run / "README.md").read_text()
    assert "](fit.png)" in card
    assert f"{choice['steps']} at a constant rate, trained as {length}" in card

    # The last run is what a command with these options makes.
    plain = {**flags, **choice["options"], "max_train_steps": length, "lr_scheduler": "linear"}
    for name in ("fit", "fit_space", "fit_budget", "fit_folds"):
        del plain[name]
    assert difference(fit_run, train_text(tmp_path / "plain", **plain)) == 0

    # Each part begins with models that no run had before: the same bytes, and no step twice.
    steps_taken = interrupt(monkeypatch, 3, 12, spent + 1)
    parts = tmp_path / "parts"
    for place in ("fit/", "fit/", f"of {length},"):
        with pytest.raises(KeyboardInterrupt, match=place):
            train_text(parts, **flags)
    with pytest.raises(UserError, match="learning_rate was"):
        train_text(parts, **flags, learning_rate=3e-2)
    train_text(parts, **flags)
    assert len(steps_taken) == spent + length
    assert {**record(parts), "settings": 0} == {**fit_record, "settings": 0}  # which name folders
    assert difference(fit_run, parts) == 0
    for run in fit_record["runs"]:
        for key in ("loss", "digest", "heldout_loss"):
            expected = column(fit_run / "fit" / run["name"], key)
            assert column(parts / "fit" / run["name"], key) == expected
    with pytest.raises(UserError, match="holds a finished --fit"):
        train_text(parts, **flags)


@pytest.mark.slow
def test_a_run_of_a_search_is_that_of_its_own_command(tmp_path):
    """With a held-out set in place of folds, and without a word about overfitting at the end.

    Under a warm-up, whose first step has rate 0, a radius that sets itself is not LoRA's.
    """
    space = tmp_path / "space.yaml"
    space.write_text("method: [bilora, lora]\nrho: auto\n")
    flags = {
        **material("classification"),
        **FIT,
        "validation_file": heldout("classification"),
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 1,
        "warmup_ratio": None,
    }
    fit = train_text(tmp_path / "fit", **flags, fit=True, fit_space=space, fit_budget=12)
    fit_record = record(fit)
    bilora, lora = fit_record["runs"]
    assert [run["title"] for run in (bilora, lora)] == ["bilora (rho auto)", "lora"]
    assert bilora["losses"] != lora["losses"]
    length = lora["steps"][-1]
    plain = train_text(tmp_path / "plain", **flags, method="lora")
    for key in ("loss", "digest"):
        assert column(fit / "fit" / "lora", key) == column(plain, key)[:length]
    rows = [row for row in runlog.read_metrics(plain) if "heldout_loss" in row]
    losses = [row["heldout_loss"] for row in rows if row["step"] <= length]
    assert lora["losses"] == pytest.approx(losses, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["probe", "train_step"])
def test_a_run_that_does_not_fit_the_memory_leaves_the_others_as_they_are(
    place, tmp_path, flags, monkeypatch
):
    """The first pass turns the error into a sentence about the model, a later step does not."""
    function = getattr(Trainer, place)

    def limited(self, *batches):
        if self.cfg.rank == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(self, *batches)

    monkeypatch.setattr(Trainer, place, limited)
    space = tmp_path / "space.yaml"
    values = {**flags, "method": "lora", "rank": None, "fit_budget": 12}
    space.write_text("rank: [8, 4]\n")
    both = record(train_text(tmp_path / "both", **values))
    assert [run["title"] for run in both["runs"]] == ["rank 4", "rank 4"]
    assert list(both["out"]) == ["rank 8"]
    space.write_text("rank: [4]\n")
    smaller = record(train_text(tmp_path / "smaller", **values))
    assert both["runs"] == smaller["runs"]


BAD_SEARCHES: list[Any] = [
    ({"fit_folds": 25}, "rank: [4]", "25 folds of 24 rows"),
    ({"fit_space": "nowhere.yaml"}, "", "nowhere.yaml"),
    ({}, "rank: [0]", "in a run of --fit, --rank is 0"),
    ({}, "method: [lora-sam]\nrho: [auto]", "only bilora can follow"),
]


@pytest.mark.parametrize(("values", "space", "words"), BAD_SEARCHES)
def test_what_cannot_be_searched_is_one_sentence(tmp_path, flags, values, space, words):
    (tmp_path / "space.yaml").write_text(space)
    with pytest.raises(UserError, match=words) as error:
        train_text(tmp_path / "run", **{**flags, **values})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_search_on_other_data_is_refused(tmp_path, monkeypatch):
    kind = "classification"
    space = tmp_path / "space.yaml"
    space.write_text("method: [bilora, lora]\n")
    rows = rows_for(kind, 8)
    heldout_rows = rows_for(kind, 8, first=24)
    train_file = write_rows(tmp_path / "train.jsonl", rows)
    heldout_file = write_rows(tmp_path / "heldout.jsonl", heldout_rows)
    flags = {
        **material(kind),
        **FIT,
        "train_file": train_file,
        "validation_file": heldout_file,
        "validation_part": "1/2",
        "fit": True,
        "fit_space": space,
        "fit_budget": 12,
    }
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="fit/"):
            train_text(folder, **flags)
    with pytest.raises(UserError, match='validation_part was "1/2" and is "2/2"'):
        train_text(folder, **{**flags, "validation_part": "2/2"})
    for file, changed_rows, words in (
        (train_file, rows[1:], "training"),
        (heldout_file, heldout_rows[::-1], "held-out"),
    ):
        original = file.read_text()
        write_rows(file, changed_rows)
        with pytest.raises(UserError, match=f"in the {words} data"):
            train_text(folder, **flags)
        file.write_text(original)
    train_text(folder, **flags)
    assert record(folder)["choice"]
