"""Runs that their held-out loss ends, and what they leave: images and text, whole and resumed."""

import json
import shutil

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.cli import main as export
from bilora_diffusion.run import checkpoint, runlog
from tests.scripts import runs
from tests.text import text_builders as texts

PATIENCE = 3
STOPPING = {"early_stopping_patience": PATIENCE, "keep_best": True}


def losses(folder):
    rows = runlog.read_metrics(folder)
    return [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]


def results(folder):
    return runlog.read_run(folder)["results"]


@pytest.fixture
def icons(tmp_path):
    """Two icons to learn and two to be measured on, at a rate that overfits at once."""
    return {
        **runs.two_icons(tmp_path / "icons"),
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
        pytest.param("seq2seq", "lora", {"init_lora_weights": "pissa"}, marks=pytest.mark.slow),
        pytest.param("classification", "full", {"learning_rate": 3e-4}, marks=pytest.mark.slow),
    ],
)
def test_text_ends_where_its_record_says_and_leaves_its_best_step(tmp_path, kind, method, values):
    given = {
        **texts.material(kind),
        **{"validation_file": texts.heldout(kind)},
        **{"method": method, "learning_rate": 3e-2, "lr_scheduler": "constant", **values},
        **{"max_train_steps": 30, "validation_loss_steps": 2, "max_new_tokens": 2},
        **{"checkpointing_steps": 2, "checkpoints_total_limit": 0},
    }
    plain = texts.train_text(tmp_path / "plain", **given)
    best, stop = runs.reading(losses(plain), PATIENCE)
    assert 0 < best < stop < 30  # else nothing is proven
    run = texts.train_text(tmp_path / "run", **given, **STOPPING)
    found = results(run)
    assert (found["best_step"], found["steps"], found["stopped_early"]) == (best, stop, True)
    assert losses(run) == [pair for pair in losses(plain) if pair[0] <= stop]
    assert found["best_heldout_loss"] == found["heldout_loss"] == dict(losses(plain))[best]
    measured = texts.heldout_of(given["model_name_or_path"], run)
    assert {key: found[key] for key in measured} == pytest.approx(measured, abs=1e-6)
    if kind != "classification":
        assert [path.parent.name for path in run.rglob("predictions.jsonl")] == [f"step-{best}"]
    if method != "full":
        assert export([str(plain), "--step", str(best)]) == 0
        assert runs.difference(plain / "exports" / f"step-{best}", run) == 0
    assert f"| {best} |" in (run / "README.md").read_text()

    parts = runs.copied(run, tmp_path / "parts")
    for step in (stop - 2, stop):  # after the best; where all is over
        again = parts / "checkpoints" / f"step-{step}"
        texts.train_text(parts, **given, **STOPPING, resume_from_checkpoint=again)
        assert runs.difference(run, parts) == 0
        assert runs.column(run, "digest") == runs.column(parts, "digest")
        assert {**results(parts), "export": 0} == {**found, "export": 0}


@pytest.mark.slow
def test_images_are_of_the_step_that_is_exported(tmp_path, icons):
    given = {**icons, "max_train_steps": 12, "use_ema": True, "ema_decay": 0.9}
    given |= {"validation_prompt": "a TOK icon", "num_validation_images": 1}
    given |= {"validation_num_inference_steps": 2, **STOPPING}
    run = runs.train(tmp_path / "run", **given)
    best, stop = runs.reading(losses(run), PATIENCE)
    assert 0 < best < stop < 12
    assert (results(run)["best_step"], results(run)["steps"]) == (best, stop)
    assert export([str(run), "--step", str(best), "--to", "diffusers"]) == 0
    assert runs.difference(run / "exports" / f"step-{best}", run) == 0
    assert [p.parent.name for p in run.glob("validation/*/*.png")] == [f"step-{best}"]
    assert f"validation/step-{best}/000.png" in (run / "README.md").read_text()
    parts = runs.resumed(run, stop - 1, **given)
    assert runs.difference(run, parts) == 0
    assert losses(run) == losses(parts)


def test_what_is_learned_and_held_out_at_once_is_one_line(tmp_path, icons, caplog):
    """Images by their files' content, rows by theirs, wherever they lie and whatever their name."""

    def lines(run, name, **given):
        caplog.clear()
        run(tmp_path / name, **{**given, "max_train_steps": 1})
        return [line.message for line in caplog.records if "copies of" in line.message]

    learned, held = icons["dataset"], icons["validation_dataset"]
    assert lines(runs.train, "apart", **icons) == []
    one, two = sorted(learned.glob("*.png"))
    shutil.copy(two, held / "another.png")
    (line,) = lines(runs.train, "one", **icons)
    assert all(part in line for part in ("1 of the 3", "another.png", two.name))
    shutil.copy(one, learned / "third.png")
    fit = {**icons, "validation_dataset": "none", "fit": True, "fit_budget": 1}
    caplog.clear()
    with pytest.raises(UserError, match="--fit_budget 1 is too small"):
        lines(runs.train, "fit", **fit)
    (line,) = [one.message for one in caplog.records if "copies of" in one.message]
    assert all(part in line for part in ("1 of the 3", "third.png", one.name))
    rows = texts.material("classification")
    again = texts.write_rows(tmp_path / "held.jsonl", texts.rows_for("classification", 3, 22))
    (line,) = lines(texts.train_text, "text", **rows, validation_file=again)
    assert all(part in line for part in ("2 of the 3", "line 1 of held.jsonl", "of rows.jsonl"))


@pytest.mark.slow
def test_two_processes_choose_as_one(tmp_path, icons):
    (tmp_path / "space.yaml").write_text("rank: [2, 4]\n")
    fit = {"fit": True, "fit_space": tmp_path / "space.yaml", "fit_budget": 8}
    given = {**icons, **fit, "max_train_steps": 4, "train_batch_size": 2}
    one, two = runs.train(tmp_path / "one", **given), tmp_path / "two"
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    runs.process(*launcher, runs.SCRIPT, *runs.flags(two, **{**given, "train_batch_size": 1}))
    for key in ("steps", "chosen_steps"):
        assert results(one)[key] == results(two)[key]
    assert runs.difference(one, two) < given["learning_rate"] / 10


@pytest.mark.slow
def test_a_resume_on_other_pictures_is_refused(tmp_path, icons, caplog):
    folder, held = icons["dataset"], icons["validation_dataset"]
    one, two = sorted(folder.glob("*.png"))
    caption = two.with_suffix(".txt")
    caption.write_text("an icon")
    shared = {**icons, "auxiliaries": "sample"}
    run = runs.train(tmp_path / "run", **shared)
    record = runlog.read_run(run)["content"]
    assert [record[name]["count"] for name in ("training", "held-out")] == [2, 2]
    go_on = {**shared, "resume_from_checkpoint": run / "checkpoints" / "step-1"}

    picture = one.read_bytes()
    shutil.copy(next(held.glob("*.png")), one)
    with pytest.raises(UserError, match=f"the picture of {one.name} changed"):
        runs.train(run, **go_on)
    one.write_bytes(picture)
    renamed = one.rename(folder / "zz.png")  # it would see the auxiliary of the other
    with pytest.raises(UserError, match=f"renamed .{one.name} to zz.png"):
        runs.train(run, **go_on)
    renamed.rename(one)
    caption.write_text("a dog")
    with pytest.raises(UserError, match=f"the caption of {two.name} changed"):
        runs.train(run, **go_on)
    caption.write_text("an icon")

    # Held-out pictures may change, unless the run leaves the best of its steps.
    runs.train(run, **go_on, validation_part="1/2")
    assert any("in the held-out data" in line.message for line in caplog.records)
    best = runs.train(tmp_path / "best", **shared, keep_best=True, validation_part="2/2")
    go_on = {**shared, "resume_from_checkpoint": best / "checkpoints" / "step-1"}
    with pytest.raises(UserError, match="validation_part was"):
        runs.train(best, **go_on, keep_best=True, validation_part="1/2")


@pytest.mark.slow
def test_a_resume_on_other_rows_is_refused(tmp_path):
    kind = "seq2seq"
    rows, held = texts.rows_for(kind, 8), texts.rows_for(kind, 4, 24)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train_file", "validation_file")}
    texts.write_rows(files["train_file"], rows)
    texts.write_rows(files["validation_file"], held)
    given = {**texts.material(kind), **files, "checkpointing_steps": 1, "max_predictions": 0}
    run = texts.train_text(tmp_path / "run", **given, early_stopping_patience=3)
    go_on = {**given, "resume_from_checkpoint": "step-1", "early_stopping_patience": 3}
    edited = [*rows[:2], {**rows[2], "answer": "five five"}, *rows[3:]]
    for changed, words in (
        (edited, "the text of line 3 of train_file.jsonl changed"),
        (rows[1:], "removed .line 1 of train_file.jsonl"),
        ([texts.rows_for(kind, 1, 99)[0], *rows], "added .line 1 of train_file.jsonl"),
        (rows[::-1], "another order"),
    ):
        texts.write_rows(files["train_file"], changed)
        with pytest.raises(UserError, match=words):
            texts.train_text(run, **go_on)
    texts.write_rows(files["train_file"], rows)
    with pytest.raises(UserError, match="max_eval_samples was null and is 2"):
        texts.train_text(run, **go_on, max_eval_samples=2)
    texts.write_rows(files["validation_file"], held[:3])
    with pytest.raises(UserError, match="in the held-out data, 1 sample was removed"):
        texts.train_text(run, **go_on)
    texts.train_text(run, **{**go_on, "early_stopping_patience": None})

    # A checkpoint of an earlier version has no record of its data, and nothing is compared. The
    # run's record has an option that left since; no checkpoint ever held that.
    saved = checkpoint.load(run / "checkpoints" / "step-1")
    del saved.extra["content"], saved.extra["config"]["validation_file"]
    checkpoint.save(run, saved)
    record = json.loads((run / "run.json").read_text())
    record["config"]["auxiliaries_on"] = "cpu"
    (run / "run.json").write_text(json.dumps(record))
    texts.train_text(run, **go_on)
