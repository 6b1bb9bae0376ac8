"""Runs that their held-out loss ends, and what they leave: images and text, whole and resumed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.errors import UserError
from bilora_diffusion.export import FILE_NAME
from bilora_diffusion.export import main as export
from bilora_diffusion.run import runlog
from bilora_diffusion.train.trainer import Trainer
from tests.scripts.runs import SCRIPT, column, difference, flags, process, train, weights
from tests.text.text_builders import (
    ADAPTER,
    heldout,
    heldout_of,
    material,
    rows_for,
    text_difference,
    train_text,
    write_rows,
)
from tests.train.stopping import reading

PATIENCE = 3
STOPPING = {"early_stopping_patience": PATIENCE, "keep_best": True}


def losses(folder: Path) -> list[tuple[int, float | None]]:
    rows = runlog.read_metrics(folder)
    return [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]


def results(folder: Path) -> dict[str, Any]:
    return runlog.read_run(folder)["results"]


def few(folder: Path, source: Path, count: int, first: int = 0) -> Path:
    """Some icons in a folder of their own."""
    folder.mkdir()
    for file in sorted(source.glob("*.png"))[first : first + count]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def icons(tmp_path: Path) -> dict[str, Any]:
    """Two icons to learn and two to be measured on, at a rate that overfits at once."""
    return {
        "dataset": few(tmp_path / "icons", mini.train_dir(), 2),
        "validation_dataset": few(tmp_path / "heldout", mini.heldout_dir(), 2),
        "pretrained_model_name_or_path": "mini",
        "instance_prompt": "a TOK icon",
        "train_batch_size": 1,
        "learning_rate": 1e-2,
        "validation_loss_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 0,
    }


@pytest.mark.parametrize(
    ("kind", "method", "values"),
    [
        ("causal", "bilora", {"use_ema": True, "ema_decay": 0.5}),
        pytest.param("classification", "lora", {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param("seq2seq", "lora", {"init_lora_weights": "pissa"}, marks=pytest.mark.slow),
        ("classification", "full", {"learning_rate": 3e-4}),
    ],
)
def test_text_ends_where_its_record_says_and_leaves_its_best_step(
    tmp_path: Path, kind: str, method: str, values: dict[str, Any]
) -> None:
    given = {
        **material(kind),
        **{"validation_file": heldout(kind)},
        **{"method": method, "learning_rate": 3e-2, "lr_scheduler": "constant", **values},
        **{"max_train_steps": 30, "validation_loss_steps": 2, "max_new_tokens": 2},
        **{"checkpointing_steps": 2, "checkpoints_total_limit": 0},
    }
    plain = train_text(tmp_path / "plain", **given)
    best, stop = reading(losses(plain), PATIENCE)
    assert stop is not None
    assert best is not None
    assert 0 < best < stop < 30  # else nothing is proven
    run = train_text(tmp_path / "run", **given, **STOPPING)
    found = results(run)
    assert (found["best_step"], found["steps"], found["stopped_early"]) == (best, stop, True)
    assert losses(run) == [pair for pair in losses(plain) if pair[0] <= stop]
    assert found["best_heldout_loss"] == found["heldout_loss"] == dict(losses(plain))[best]
    measured = heldout_of(given["model_name_or_path"], run)
    assert {key: found[key] for key in measured} == pytest.approx(measured, abs=1e-6)
    if kind != "classification":
        assert [path.parent.name for path in run.rglob("predictions.jsonl")] == [f"step-{best}"]
    if method != "full":
        assert export([str(plain), "--step", str(best)]) == 0
        made = load_file(plain / "exports" / f"step-{best}" / ADAPTER)
        assert all(torch.equal(made[key], value) for key, value in load_file(run / ADAPTER).items())
    assert f"| {best} |" in (run / "README.md").read_text()

    parts = Path(shutil.copytree(run, tmp_path / "parts"))
    for step in (f"step-{stop - 2}", f"step-{stop}"):  # after the best; where all is over
        again = parts / "checkpoints" / step
        train_text(parts, **given, **STOPPING, resume_from_checkpoint=again)
        assert text_difference(run, parts) == 0
        assert column(run, "digest") == column(parts, "digest")
        assert {**results(parts), "export": 0} == {**found, "export": 0}


@pytest.mark.slow
def test_images_are_of_the_step_that_is_exported(tmp_path: Path, icons: dict[str, Any]) -> None:
    given = {
        **{**icons, "max_train_steps": 12, "use_ema": True, "ema_decay": 0.9},
        **{"train_text_encoder": True, "text_encoder_lr": 1e-3},
    }
    plain = train(tmp_path / "plain", **given)
    best, stop = reading(losses(plain), PATIENCE)
    assert stop is not None
    assert best is not None
    assert 0 < best < stop < 12
    shown = {"validation_prompt": "a TOK icon", "num_validation_images": 1}
    run = train(tmp_path / "run", **given, **shown, **STOPPING)
    assert (results(run)["best_step"], results(run)["steps"]) == (best, stop)
    assert export([str(plain), "--step", str(best), "--to", "diffusers"]) == 0
    made, kept = load_file(plain / "exports" / f"step-{best}" / FILE_NAME), weights(run)
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[key], kept[key]) for key in made)
    assert [p.parent.name for p in run.glob("validation/*/*.png")] == [f"step-{best}"]
    assert f"validation/step-{best}/000.png" in (run / "README.md").read_text()
    parts = Path(shutil.copytree(run, tmp_path / "parts"))
    train(parts, **given, **shown, **STOPPING, resume_from_checkpoint=f"step-{stop - 1}")
    assert difference(run, parts) == 0
    assert losses(run) == losses(parts)


@pytest.mark.slow
def test_folds_choose_the_steps_of_the_run_on_all(tmp_path: Path, icons: dict[str, Any]) -> None:
    given = {
        **{**icons, "validation_loss_steps": 2, "max_train_steps": 6, "learning_rate": 3e-3},
        # a schedule that ends with the steps tried, which the last run keeps
        **{"lr_scheduler": "cosine", "checkpointing_steps": 3, "validation_dataset": "none"},
    }
    run = train(tmp_path / "run", **given, folds=2)
    curves = folds_of(run, 2)
    assert all(list(curve) == [0, 2, 4, 6] for curve in curves)
    chosen = min((2, 4, 6), key=lambda step: sum(curve[step] for curve in curves))
    assert results(run)["chosen_steps"] == results(run)["steps"] == chosen
    assert runlog.read_run(run)["num_steps"] == chosen
    for n in (1, 2):
        assert not weights_there(run / "folds" / str(n))
    assert "](folds.png)" in (run / "README.md").read_text()
    assert (run / "folds.png").stat().st_size > 5_000
    # As a run of the same schedule is at that step.
    plain = train(tmp_path / "plain", **{**given, "checkpointing_steps": chosen})
    assert column(plain, "loss")[:chosen] == column(run, "loss")
    assert export([str(plain), "--step", str(chosen), "--to", "diffusers"]) == 0
    made = load_file(plain / "exports" / f"step-{chosen}" / FILE_NAME)
    assert all(torch.equal(made[key], value) for key, value in weights(run).items())


@pytest.mark.slow
def test_folds_go_on_where_they_were_interrupted(
    tmp_path: Path, icons: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**icons, "max_train_steps": 4, "validation_loss_steps": 2, "folds": 2}
    whole = train(tmp_path / "whole", **given)
    chosen, step = results(whole)["chosen_steps"], Trainer.train_step
    taken: list[int] = []

    def interrupted(self: Any, batches: Any) -> Any:
        taken.append(self.step)
        if len(taken) in (6, 9):  # the second fold's second step; the last run's first
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt, match=r"step 2 of 4 of fold 2.*folds/2/.*step-2"):
        train(parts, **given)
    assert runlog.read_run(parts)["status"] == "interrupted"
    first = (parts / "folds" / "1" / "run.json").read_bytes()
    with pytest.raises(UserError, match="rank"):
        train(parts, **given, rank=2, resume_from_checkpoint="auto")
    with pytest.raises(KeyboardInterrupt, match=f"step 1 of {chosen},"):
        train(parts, **given, resume_from_checkpoint="auto")
    train(parts, **given, resume_from_checkpoint="latest")
    assert len(taken) == 8 + chosen  # no step was taken twice
    assert (parts / "folds" / "1" / "run.json").read_bytes() == first
    assert difference(whole, parts) == 0
    assert folds_of(whole) == folds_of(parts)
    for name in ("folds.json", "folds.png"):
        assert (whole / name).stat().st_size == (parts / name).stat().st_size
    # A fold made by hand is the same.
    alone = train(tmp_path / "alone", **given, fold=2)
    assert losses(alone) == losses(whole / "folds" / "2")
    fresh = train(parts, **{**given, "folds": None}, overwrite_output_dir=True)
    assert not (fresh / "folds").exists()


def test_text_has_folds_too(tmp_path: Path) -> None:
    given = {
        **{**material("classification"), "validation_loss_steps": 2, "folds": 3},
        **{"max_train_steps": 6, "validation_file": None, "method": "lora"},
    }
    run = train_text(tmp_path / "run", **given)
    curves = folds_of(run, 3)
    chosen = min((2, 4, 6), key=lambda step: sum(curve[step] for curve in curves))
    assert results(run)["steps"] == chosen
    with pytest.raises(UserError, match=r"--folds 25.*24 rows"):
        train_text(tmp_path / "many", **{**given, "folds": 25})


def test_what_is_learned_and_held_out_at_once_is_one_line(
    tmp_path: Path, icons: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Images by their files' content, rows by theirs, wherever they lie and whatever their name."""

    def lines(run: Any, name: str, **given: Any) -> list[str]:
        caplog.clear()
        run(tmp_path / name, **{**given, "max_train_steps": 1})
        return [line.message for line in caplog.records if "copies of" in line.message]

    learned, held = icons["dataset"], icons["validation_dataset"]
    assert lines(train, "apart", **icons) == []
    one, two = sorted(learned.glob("*.png"))
    shutil.copy(two, held / "another.png")
    (line,) = lines(train, "one", **icons)
    assert all(part in line for part in ("1 of the 3", "another.png", two.name))
    shutil.copy(one, learned / "third.png")
    fold = {**icons, "validation_dataset": "none", "folds": 3}
    (line,) = [line for n in (1, 2) for line in lines(train, f"fold-{n}", **fold, fold=n)]
    assert all(part in line for part in ("1 of the 3", "third.png", one.name))
    rows = material("classification")
    again = write_rows(tmp_path / "held.jsonl", rows_for("classification", 3, 22))
    (line,) = lines(train_text, "text", **rows, validation_file=again)
    assert all(part in line for part in ("2 of the 3", "line 1 of held.jsonl", "of rows.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("values", [STOPPING, {"folds": 2}], ids=["best", "folds"])
def test_two_processes_agree_with_one(
    tmp_path: Path,
    icons: dict[str, Any],
    values: dict[str, Any],
) -> None:
    given = {**icons, **values, "max_train_steps": 6, "train_batch_size": 2}
    one = train(tmp_path / "one", **given)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    own = flags(tmp_path / "two", **{**given, "train_batch_size": 1})
    said = process(*launcher, SCRIPT, *own)
    assert said.returncode == 0, said.stderr
    two = tmp_path / "two"
    for key in ("steps", "best_step", "chosen_steps"):
        assert results(one).get(key) == results(two).get(key)
    assert difference(one, two) < given["learning_rate"] / 10


def folds_of(folder: Path, count: int = 2) -> list[dict[int, Any]]:
    """The curves as the folds' own records have them."""
    return [dict(losses(folder / "folds" / str(n))) for n in range(1, count + 1)]


def weights_there(folder: Path) -> bool:
    return (folder / FILE_NAME).exists() or (folder / "README.md").exists()
