"""Early stopping and the choice of the best step, in complete and resumed runs."""

import copy
import json
import shutil

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.__main__ import main as export
from bilora_diffusion.run import checkpoint, runlog
from tests.scripts.runs import (
    best_and_stop_step,
    column,
    copied,
    difference,
    train,
    two_icons,
    weights,
)
from tests.text.text_builders import heldout, heldout_of, material, rows_for, train_text, write_rows

PATIENCE = 3
STOPPING = {"early_stopping_patience": PATIENCE, "keep_best": True}


def losses(folder):
    rows = runlog.read_metrics(folder)
    return [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]


def results(folder):
    return runlog.read_run(folder)["results"]


@pytest.fixture
def icons(tmp_path):
    """Return flags for two training and two held-out icons, at a rate that overfits immediately."""
    return {
        **two_icons(tmp_path / "icons"),
        "train_batch_size": 1,
        "learning_rate": 1e-2,
        "validation_loss_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "values"),
    [
        ("causal", "bilora", {}),
        pytest.param("classification", "full", {"learning_rate": 3e-4}, marks=pytest.mark.slow),
    ],
)
def test_a_text_run_stops_early_and_exports_its_best_step(tmp_path, kind, method, values):
    options = {
        **material(kind),
        "validation_file": heldout(kind),
        "method": method,
        "learning_rate": 3e-2,
        "lr_scheduler": "constant",
        "max_train_steps": 30,
        "validation_loss_steps": 2,
        "max_new_tokens": 2,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 0,
        **values,
    }
    plain = train_text(tmp_path / "plain", **options)
    best, stop = best_and_stop_step(losses(plain), PATIENCE)
    assert 0 < best < stop < 30  # otherwise the test proves nothing
    run = train_text(tmp_path / "run", **options, **STOPPING)
    outcome = results(run)
    assert outcome["best_step"] == best
    assert outcome["steps"] == stop
    assert outcome["stopped_early"] is True
    assert losses(run) == [(step, loss) for step, loss in losses(plain) if step <= stop]
    assert outcome["best_heldout_loss"] == outcome["heldout_loss"] == dict(losses(plain))[best]
    measured = heldout_of(options["model_name_or_path"], run)
    assert {key: outcome[key] for key in measured} == pytest.approx(measured, abs=1e-6)
    if kind != "classification":
        assert [path.parent.name for path in run.rglob("predictions.jsonl")] == [f"step-{best}"]
    if method != "full":
        assert export([str(plain), "--step", str(best)]) == 0
        assert difference(plain / "exports" / f"step-{best}", run) == 0
    assert f"| {best} |" in (run / "README.md").read_text()

    # A run that is resumed after its best step still exports that step, from its checkpoint.
    parts = copied(run, tmp_path / "parts")
    after_best = parts / "checkpoints" / f"step-{stop - 2}"
    go_on = {"resume_from_checkpoint": after_best, "overwrite_output_dir": True}
    train_text(parts, **options, **STOPPING, **go_on)
    assert difference(run, parts) == 0
    assert column(run, "digest") == column(parts, "digest")
    resumed_outcome = results(parts)
    del resumed_outcome["export"], outcome["export"]  # exports name their folders
    assert resumed_outcome == outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "measure", "rate"),
    [("seq2seq", "heldout_exact_match", 1e-2), ("classification", "heldout_accuracy", 1e-2)],
)
def test_a_text_run_exports_the_step_of_the_best_score(tmp_path, kind, measure, rate):
    """The run, its control and a resumed run split the rows in the same way, by content."""
    options = {
        **material(kind),
        "train_file": write_rows(tmp_path / "rows.jsonl", rows_for(kind, 60)),
        "validation_split": 0.3,
        "choose_by": "score",
        "learning_rate": rate,
        "lr_scheduler": "constant",
        "max_train_steps": 60,
        "validation_loss_steps": 4,
        "checkpointing_steps": 4,
        "checkpoints_total_limit": 0,
        "max_new_tokens": 3,
        "compare": "lora",
        "keep_best": True,
        "early_stopping_patience": 5,
    }
    run = train_text(tmp_path / "run", **options)
    measurements = []
    for row in runlog.read_metrics(run):
        if "heldout_loss" in row and row["step"] % 4 == 0:
            measurements.append((row["step"], -row[measure]))
    outcome = results(run)
    best, stop = best_and_stop_step(measurements, 5)
    assert 0 < best < outcome["steps"]  # otherwise the test proves nothing
    assert outcome["chosen_by"] == measure
    assert (outcome["best_step"], outcome["steps"]) == (best, stop or 60)
    assert outcome[f"best_{measure}"] == -dict(measurements)[best] == outcome[measure]
    assert export([str(run), "--step", str(best)]) == 0
    assert difference(run / "exports" / f"step-{best}", run) == 0

    control = runlog.read_run(tmp_path / "run-lora")
    assert control["content"] == runlog.read_run(run)["content"]
    parts = copied(run, tmp_path / "parts")
    go_on = {**options, "compare": None, "overwrite_output_dir": True}
    go_on["resume_from_checkpoint"] = parts / "checkpoints" / f"step-{best + 4}"
    train_text(parts, **go_on)
    assert difference(run, parts) == 0
    resumed_outcome = results(parts)
    del resumed_outcome["export"], outcome["export"]  # exports name their folders
    assert resumed_outcome == outcome
    for name, value in {"choose_by": "loss", "validation_split": 0.2}.items():
        with pytest.raises(UserError, match=name):
            train_text(parts, **{**go_on, name: value})


def test_the_best_step_is_a_trained_step_even_if_the_base_model_is_better(tmp_path, caplog):
    """At step 0 each B is zero, so the file would have no effect."""
    caplog.set_level("INFO")
    # The training rows, each with the wrong answer
    rows = []
    for row in rows_for("classification", 24):
        answer = "negative" if row["answer"] == "positive" else "positive"
        rows.append(row | {"answer": answer})
    file = write_rows(tmp_path / "other.jsonl", rows)
    options = {**material("classification"), "validation_file": file, "train_batch_size": 24}
    options |= {"lr_scheduler": "constant", "max_train_steps": 4, "validation_loss_steps": 1}
    run = train_text(tmp_path / "run", **options, keep_best=True, early_stopping_patience=4)
    measured = dict(losses(run))
    assert min(measured, key=measured.__getitem__) == 0
    best = results(run)["best_step"]
    assert best == min(range(1, 5), key=measured.__getitem__)
    assert any(key.endswith("lora_B.weight") and value.any() for key, value in weights(run).items())
    (end,) = [record.message for record in caplog.records if record.message.startswith("done in")]
    assert f"the files have the weights of step {best}, the best" in end
    assert "no measured step was better than the base model" in end


@pytest.mark.slow
def test_the_images_are_those_of_the_exported_step(tmp_path, icons):
    options = {
        "max_train_steps": 12,
        "validation_prompt": "a TOK icon",
        "validation_epochs": 100,  # only at the end
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "choose_by": "loss",
    }
    run = train(tmp_path / "run", **icons, **options, **STOPPING)
    best, stop = best_and_stop_step(losses(run), PATIENCE)
    assert 0 < best < stop < 12
    assert (results(run)["best_step"], results(run)["steps"]) == (best, stop)
    assert export([str(run), "--step", str(best), "--to", "diffusers"]) == 0
    assert difference(run / "exports" / f"step-{best}", run) == 0
    assert [p.parent.name for p in run.glob("validation/*/*.png")] == [f"step-{best}"]
    assert f"validation/step-{best}/000.png" in (run / "README.md").read_text()


@pytest.mark.slow
def test_held_out_samples_that_are_also_trained_on_are_reported_in_one_line(
    tmp_path, icons, caplog
):
    """Images are compared by their files' content and rows by their text; names are ignored."""

    def copies_line(train_run, name, **values):
        caplog.clear()
        train_run(tmp_path / name, **values)
        messages = [record.message for record in caplog.records]
        (line,) = [message for message in messages if "also trained on" in message]
        return line

    icon = sorted(icons["dataset"].glob("*.png"))[1]
    shutil.copy(icon, icons["validation_dataset"] / "another.png")
    line = copies_line(train, "image", **{**icons, "max_train_steps": 1})
    for words in ("1 of the 3", "another.png", icon.name):
        assert words in line
    rows = {**material("classification"), "max_train_steps": 1}
    # The training rows have the numbers 0 to 23, the held-out rows 22 to 24.
    heldout_rows = rows_for("classification", 3, first=22)
    file = write_rows(tmp_path / "held.jsonl", heldout_rows)
    line = copies_line(train_text, "text", **rows, validation_file=file)
    for words in ("2 of the 3", "line 1 of held.jsonl", "of rows.jsonl"):
        assert words in line


@pytest.mark.slow
def test_resuming_on_other_pictures_is_refused(tmp_path, icons, caplog):
    picture, renamed = sorted(icons["dataset"].glob("*.png"))
    shared = dict(icons)
    run = train(tmp_path / "run", **shared)
    content = runlog.read_run(run)["content"]
    assert content["training"]["count"] == content["held-out"]["count"] == 2
    go_on = {**shared, "overwrite_output_dir": True}
    go_on["resume_from_checkpoint"] = run / "checkpoints" / "step-1"

    original = picture.read_bytes()
    shutil.copy(next(icons["validation_dataset"].glob("*.png")), picture)
    with pytest.raises(UserError, match=f"the picture of {picture.name} changed"):
        train(run, **go_on)
    picture.write_bytes(original)
    moved = renamed.rename(renamed.with_name("0.png"))
    with pytest.raises(UserError, match=f"renamed .{renamed.name} to {moved.name}"):
        train(run, **go_on)
    moved.rename(renamed)
    # The same pictures may be in another folder.
    elsewhere = icons["dataset"].rename(tmp_path / "elsewhere")
    train(run, **{**go_on, "dataset": None, "instance_data_dir": elsewhere})
    elsewhere.rename(icons["dataset"])

    # Held-out pictures may change, unless the run exports its best step.
    train(run, **go_on, max_eval_samples=1)
    assert any("in the held-out data" in record.message for record in caplog.records)
    best = train(tmp_path / "best", **shared, keep_best=True)
    go_on["resume_from_checkpoint"] = best / "checkpoints" / "step-1"
    with pytest.raises(UserError, match="max_eval_samples was null and is 1"):
        train(best, **go_on, keep_best=True, max_eval_samples=1)


@pytest.mark.slow
def test_resuming_on_other_rows_is_refused(tmp_path):
    rows = rows_for("seq2seq", 8)
    file = write_rows(tmp_path / "train.jsonl", rows)
    options = {**material("seq2seq"), "train_file": file, "checkpointing_steps": 1}
    run = train_text(tmp_path / "run", **options)
    go_on = {**options, "resume_from_checkpoint": "step-1", "overwrite_output_dir": True}
    changed_rows = copy.deepcopy(rows)
    changed_rows[2]["answer"] = "five"
    write_rows(file, changed_rows)
    with pytest.raises(UserError, match="the text of line 3 of train"):
        train_text(run, **go_on)

    # The checkpoint and the run's record may hold options of earlier versions.
    write_rows(file, rows)
    (tmp_path / "elsewhere").mkdir()
    go_on["train_file"] = file.rename(tmp_path / "elsewhere" / file.name)
    saved = checkpoint.load(run / "checkpoints" / "step-1")
    saved.extra["config"] |= {"efm_beta": 0.9, "use_ema": False, "auxiliaries": 1}
    checkpoint.save(run, saved)
    record = json.loads((run / "run.json").read_text())
    record["config"]["auxiliaries_on"] = "cpu"
    (run / "run.json").write_text(json.dumps(record))
    train_text(run, **go_on)


@pytest.mark.slow
def test_a_run_can_be_extended_only_if_its_warm_up_stays_the_same(tmp_path):
    options = {**material("seq2seq"), "checkpointing_steps": 1, "max_train_steps": 2}
    options["lr_scheduler"] = "constant_with_warmup"
    longer = {"max_train_steps": 8, "resume_from_checkpoint": "auto"}
    options["warmup_ratio"] = 0.5
    run = train_text(tmp_path / "share", **options)
    with pytest.raises(UserError, match="max_train_steps"):
        train_text(run, **{**options, **longer})

    options |= {"warmup_ratio": None, "lr_warmup_steps": 1}
    run = train_text(tmp_path / "steps", **options)
    train_text(run, **{**options, **longer})
    assert results(run)["steps"] == 8
