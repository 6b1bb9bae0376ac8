"""Checkpoints as subjects: which, what they are called, what is best, and what is refused."""

from pathlib import Path

import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import checkpoint
from eval import checkpoints, compare, table, text_scores
from eval.checkpoints import HELDOUT_LOSS, LOSS
from eval.table import Entry, Metric, Result, Row
from eval.text_scores import base_models
from tests.eval.text_score_models import save_record
from tests.run import recorded_runs

ACCURACY = "heldout_accuracy"


def make_run(folder, seed=0, steps=(5, 10, 20)):
    """A text run with the checkpoints 10 and 20, held-out figures of ``steps``, and no weights."""
    rows = [(s, {HELDOUT_LOSS: 1 / s, ACCURACY: 0.5 + seed / 10 - s / 100}) for s in steps]
    save_record(folder, seed=seed, rows=rows)
    peft = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    result = {"adapters": {"model": peft}, "averaged": []}
    empty = {"state": {}, "param_groups": []}
    for step in (10, 20):
        tensors = {f"model/default/q.lora_{s}.weight": torch.ones(1, 1) * step for s in "AB"}
        extra = {"result": result, "average": None}
        state = checkpoint.Checkpoint(step, tensors, empty, {}, None, extra)
        checkpoint.save(folder, state)
    return folder


@pytest.mark.parametrize("text", ["", "alle", "40,", "-40", "1.5", "40..80", "9" * 5000])
def test_what_is_no_steps_is_refused(text):
    assert checkpoints.read_steps("200, 40,80,40") == [40, 80, 200]
    with pytest.raises(UserError, match=r"--steps is .*write all"):
        checkpoints.read_steps(text)


def test_a_text_run_is_scored_at_every_checkpoint(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    out = ["--output_dir", str(tmp_path / "out")]
    assert text_scores.main([runs[0], "--steps", "all", *out]) == 0
    result = table.read(tmp_path / "out")
    assert [subject.label for subject in result.subjects] == ["step 10", "step 20"]
    assert len({subject.digest for subject in result.subjects}) == 2
    assert result.control == "step 20"
    accuracy = [row.value for row in result.rows if row.metric == "heldout:cola:accuracy"]
    assert accuracy == pytest.approx([0.4, 0.3])
    assert [row.value for row in result.select("heldout:cola:loss")] == [0.1, 0.05]
    assert result.figures == [checkpoints.FIGURE]
    assert (tmp_path / "out" / checkpoints.FIGURE).stat().st_size > 1000
    by_accuracy, by_loss = result.settings["best_steps"]
    assert "best at step 10 (40.00), to the last step +10.00" in by_accuracy
    assert "best at step 20 (0.0500), the last" in by_loss
    assert str(tmp_path) not in (tmp_path / "out" / table.FILE).read_text()

    unmeasured = make_run(tmp_path / "c", steps=(5, 15))
    assert text_scores.main([str(unmeasured), "--steps", "all", *out]) == 2
    assert "no held-out figure" in capsys.readouterr().err
    assert text_scores.main([*runs, "--steps", "20", *out]) == 0  # seeds of one method: one row
    both = table.read(tmp_path / "out")
    assert [subject.label for subject in both.subjects] == ["a step 20", "b step 20"]
    assert both.groups == ["step 20"]
    line = both.summary("step 20", "heldout:cola:accuracy")
    assert line.interval == pytest.approx((0.3, 0.4))


def test_a_run_that_ended_before_its_first_checkpoint_is_named_with_both_numbers(tmp_path):
    folder = recorded_runs.make(tmp_path, steps=(40,), config={"checkpointing_steps": 100})
    sentence = checkpoints.without_checkpoints(folder)
    assert "ended at step 40" in sentence
    assert "--checkpointing_steps 100" in sentence


def test_runs_of_several_rows_stand_before_their_steps(tmp_path):
    runs = [str(make_run(tmp_path / name)) for name in "ab"]
    groups = [word for run in runs for word in ("--group", f"row {Path(run).name}={run}")]
    args = text_scores.TextScores.parser().read([*groups, "--steps", "all"])
    subjects = [subject for subject, _ in base_models.read_subjects(args, True)]
    assert [subject.group for subject in subjects] == [
        f"row {r} step {s}" for r in "ab" for s in (10, 20)
    ]
    assert checkpoints.last_group(subjects) == "row a step 20"


def over_steps(second):
    """Of one run whose scores of twelve prompts at step 20 are its last step's plus ``second``."""
    metrics = {"i2t": Metric("score", "", True, 100, ".1f"), HELDOUT_LOSS: LOSS}
    rows, entries = [], []
    for step, change in ((10, -0.5), (20, second), (30, 0.0)):
        name = f"step {step}"
        entries.append(Entry(name, name, about={"run": "dog", "step": step}))
        for n in range(12):
            noise = 0.01 * (-1) ** n * (step != 30)
            rows.append(Row(name, name, 0, "i2t", f"prompt {n}", value=n / 100 + change + noise))
        if step != 20:
            rows.append(Row(name, name, None, HELDOUT_LOSS, value=step / 10))
    result = Result("clip_scores", entries, metrics, rows=rows)
    return checkpoints.curves(
        result, lambda rows, control: compare.summaries(rows, control, compare.ITEM)
    )


@pytest.mark.parametrize(("second", "expected"), [(0.1, "excludes"), (0.001, "includes")])
def test_the_best_step_and_how_sure_it_is(second, expected, tmp_path):
    curves = over_steps(second)
    score, loss = checkpoints.best(curves)
    assert score.startswith("score: best at step 20 (")
    assert score.endswith(f"/12 items better: the interval {expected} zero.")
    assert loss.startswith("held-out loss: best at step 10 (1.0000), to the last step -2.0000")
    points = curves.over_training("dog", "i2t")
    assert [point.step for point in points] == [10, 20, 30]
    assert all(p.interval and p.mean and p.interval[0] < p.mean < p.interval[1] for p in points)
    assert [point.step for point in curves.over_training("dog", HELDOUT_LOSS)] == [10, 30]
    assert checkpoints.draw(curves, tmp_path) in {path.name for path in tmp_path.iterdir()}
