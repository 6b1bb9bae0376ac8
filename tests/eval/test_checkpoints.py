"""Checkpoints as subjects: their choice and labels, the best step, and refused input."""

import re
from functools import partial

import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.statistics import mean_interval
from bilora_diffusion.run import checkpoint
from eval import checkpoints, text_scores
from eval.checkpoints import HELDOUT_LOSS, LOSS
from eval.clip_scores.best_step import best_steps
from eval.results import compare, table
from eval.results.table import Entry, Metric, Result, Row
from eval.text_scores import base_models
from tests.eval.commands import result_of
from tests.eval.text_score_models import save_record
from tests.run import recorded_runs

ACCURACY = "heldout_accuracy"
SUMMARIZE = partial(compare.summaries, unit=compare.ITEM)


def make_run(folder, seed=0, steps=(5, 10, 20), interval=10):
    """Write a text run with checkpoints at steps 10 and 20, and held-out metrics at ``steps``."""
    rows = []
    for step in steps:
        accuracy = 0.5 + seed / 10 - step / 100  # falls like the loss
        rows.append((step, {HELDOUT_LOSS: 1 / step, ACCURACY: accuracy}))
    save_record(folder, seed=seed, rows=rows, checkpointing_steps=interval)
    peft = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    extra = {"result": {"adapters": {"model": peft}}}
    for step in (10, 20):
        factor = torch.full((1, 1), float(step))
        tensors = {
            "model/default/q.lora_A.weight": factor,
            "model/default/q.lora_B.weight": factor.clone(),
        }
        optimizer = {"state": {}, "param_groups": []}
        checkpoint.save(folder, checkpoint.Checkpoint(step, tensors, optimizer, {}, None, extra))
    return folder


def labels(subjects):
    return [subject.label for subject in subjects]


@pytest.mark.parametrize("text", ["", "alle", "40,", "-40", "1.5", "40..80", "9" * 5000])
def test_malformed_lists_of_steps_are_refused(text):
    assert checkpoints.read_steps("200, 40,80,40") == [40, 80, 200]
    with pytest.raises(UserError, match=r"--steps is .*write all"):
        checkpoints.read_steps(text)


def test_a_text_run_is_scored_at_every_checkpoint(tmp_path):
    run = make_run(tmp_path / "a")
    out = tmp_path / "out"
    result = result_of(text_scores.main, out, run, "--steps", "all")
    assert labels(result.subjects) == ["step 10", "step 20"]
    assert result.subjects[0].digest != result.subjects[1].digest
    assert result.control == "step 20"
    for metric, values in (("accuracy", [0.4, 0.3]), ("loss", [0.1, 0.05])):
        rows = result.select(f"heldout:cola:{metric}")
        assert [row.value for row in rows] == pytest.approx(values)
    assert result.figures == [checkpoints.FIGURE]
    assert (out / checkpoints.FIGURE).stat().st_size > 1000
    by_accuracy, by_loss = result.settings["best_steps"]
    assert "best at step 10 (40.00), difference from the last step +10.00" in by_accuracy
    assert "best at step 20 (0.0500), the last" in by_loss
    assert str(tmp_path) not in (out / table.FILE).read_text()


@pytest.mark.slow
def test_a_checkpoint_saved_by_an_interruption_is_skipped_unless_it_is_named_or_last(
    tmp_path, capsys
):
    make_run(tmp_path / "a")  # checkpoints 10 and 20
    make_run(tmp_path / "b", interval=20)
    make_run(tmp_path / "c", interval=15)
    for name, text, scored_steps, sentence in (
        ("a", "all", [10, 20], ""),
        ("b", "all", [20], r"Left out of b: 1 checkpoint \(10\) .*; --steps 10,20 scores all"),
        ("b", "10,20", [10, 20], ""),
        ("c", "all", [20], r"Left out of c: 1 checkpoint \(10\) "),
    ):
        out = tmp_path / f"out-{name}-{text}"
        result = result_of(text_scores.main, out, tmp_path / name, "--steps", text)
        assert labels(result.subjects) == [f"step {step}" for step in scored_steps]
        assert re.search(sentence, " ".join(result.notes))
        assert ("Left out" in capsys.readouterr().out) == (sentence != "")


def test_seeds_of_one_method_at_one_step_are_one_group(tmp_path):
    first, second = make_run(tmp_path / "a", seed=0), make_run(tmp_path / "b", seed=1)
    result = result_of(text_scores.main, tmp_path / "out", first, second, "--steps", "20")
    assert labels(result.subjects) == ["a step 20", "b step 20"]
    assert result.groups == ["step 20"]
    line = result.summary("step 20", "heldout:cola:accuracy")
    assert line.interval == pytest.approx(mean_interval([0.3, 0.4]))


def test_steps_without_a_held_out_metric_are_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=(5, 15))
    words = [str(run), "--steps", "all", "--output_dir", str(tmp_path / "out")]
    assert text_scores.main(words) == 2
    assert "no held-out metric" in capsys.readouterr().err


def test_the_message_for_a_run_without_checkpoints_has_its_last_step_and_interval(tmp_path):
    folder = recorded_runs.make(tmp_path, steps=(40,), config={"checkpointing_steps": 100})
    sentence = checkpoints.without_checkpoints(folder)
    assert "ended at step 40" in sentence
    assert "--checkpointing_steps 100" in sentence


def test_groups_of_checkpoints_are_named_by_group_and_step(tmp_path):
    words = ["--steps", "all"]
    for name in ("a", "b"):
        words += ["--group", f"row {name}={make_run(tmp_path / name)}"]
    args = text_scores.TextScores.parser().read(words)
    subjects = [subject for subject, _ in base_models.read_subjects(args, True)]
    groups = [subject.group for subject in subjects]
    assert groups == ["row a step 10", "row a step 20", "row b step 10", "row b step 20"]
    assert checkpoints.last_group(subjects) == "row a step 20"


def curves_of_one_run(advantage):
    """Return curves of a run with scores at steps 10, 20 and 30, and losses at 10 and 30.

    The scores are those of twelve prompts.

    Args:
        advantage: mean score at step 20 minus that at the last step.
    """
    metrics = {"i2t": Metric("score", "", True, 100, ".1f"), HELDOUT_LOSS: LOSS}
    rows, entries = [], []
    for step, change in ((10, -0.5), (20, advantage), (30, 0.0)):
        name = f"step {step}"
        entries.append(Entry(name, name, about={"run": "dog", "step": step}))
        for number in range(12):
            # Differences from the last step vary by 0.01, so their interval has a width.
            noise = 0.0
            if step != 30:
                noise = 0.01 * (-1) ** number
            score = number / 100 + change + noise
            rows.append(Row(name, name, 0, "i2t", f"prompt {number}", value=score))
        if step != 20:
            rows.append(Row(name, name, None, HELDOUT_LOSS, value=step / 10))

    result = Result("clip_scores", entries, metrics, rows=rows)
    return checkpoints.curves(result, SUMMARIZE)


@pytest.mark.parametrize(("advantage", "verb"), [(0.1, "excludes"), (0.001, "includes")])
def test_the_best_step_is_reported_with_its_interval(advantage, verb, tmp_path):
    curves = curves_of_one_run(advantage)
    score, loss = checkpoints.best(curves)
    assert score.startswith("score: best at step 20 (")
    assert score.endswith(f"/12 items better; the interval {verb} zero.")
    assert loss.startswith(
        "held-out loss: best at step 10 (1.0000), difference from the last step -2.0000"
    )
    points = curves.over_training("dog", "i2t")
    assert [point.step for point in points] == [10, 20, 30]
    for point in points:
        assert point.mean is not None
        assert point.interval[0] < point.mean < point.interval[1]
    assert [point.step for point in curves.over_training("dog", HELDOUT_LOSS)] == [10, 30]
    assert (tmp_path / checkpoints.draw(curves, tmp_path)).exists()


METRICS_OF_IMAGES = {
    "i2t": Metric("I2T", "", True, 100, ".2f"),
    "truth": Metric("truth", "", True, 100, ".2f"),
    "nearest": Metric("memorization", "", False, 100, ".2f"),
}


def answers_of(scores, count=12, runs=("dog",)):
    """Return the answers for checkpoints that are scored on ``count`` prompts each.

    Args:
        scores: metric -> step -> mean difference from the last step. The difference of each
            prompt is 0.01 above or below this mean.
        count: number of prompts.
        runs: names of the runs, all with the same scores.
    """
    rows, entries = [], {}
    for run in runs:
        for metric, changes in scores.items():
            for step, change in changes.items():
                name = f"{run} step {step}"
                entries[name] = Entry(name, name, about={"run": run, "step": step})
                for number in range(count):
                    noise = 0.01 * (-1) ** number if change else 0.0
                    value = number / 100 + change + noise
                    rows.append(Row(name, name, 0, metric, f"prompt {number}", value=value))
    result = Result("clip_scores", list(entries.values()), METRICS_OF_IMAGES, rows=rows)
    return best_steps(checkpoints.curves(result, SUMMARIZE))


SURE, UNSURE = 0.1, 0.005
ANSWERS = {
    "truth, surely better": (
        {"truth": {10: UNSURE, 20: SURE, 30: 0}, "i2t": {10: SURE, 20: UNSURE, 30: 0}},
        20,
        r"By truth step 20 is better than the last \(30\), \+10\.00 \[\+9\..*\]: take it, and",
    ),
    "truth, surely better, and worse by others": (
        {
            "truth": {20: SURE, 30: 0},
            "i2t": {20: -SURE, 30: 0},
            "nearest": {20: SURE, 30: 0},
        },
        20,
        r"By truth step 20 is better .*, but worse by I2T, -10.* and by memorization, \+10.*: look",
    ),
    "truth, not surely better": (
        {"truth": {10: UNSURE, 20: -SURE, 30: 0}, "i2t": {10: UNSURE, 20: UNSURE, 30: 0}},
        10,
        r"No step is clearly better than the last \(30\) by truth \(the best of the others is step"
        r" 10, \+0\.50 \[-.*\]\): keep the last, and look at the images\.",
    ),
    "truth, not surely better, and the other scores say otherwise": (
        {
            "truth": {10: UNSURE, 30: 0},
            "i2t": {10: SURE, 30: 0},
            "nearest": {10: -SURE, 30: 0},
        },
        10,
        r"No step is clearly better .*\), though step 10 is better by I2T \(\+10.*: keep the last,",
    ),
    "truth, all others worse": (
        {"truth": {10: -SURE, 20: -0.05, 30: 0}, "i2t": {10: SURE, 20: SURE, 30: 0}},
        20,
        r"The last step \(30\) is the best by truth \(.* step 20, -5\.00 \[-5.*\]\): keep it\.",
    ),
    "without truth, surely better": (
        {"i2t": {10: UNSURE, 20: SURE, 30: 0}, "nearest": {10: -SURE, 20: -SURE, 30: 0}},
        20,
        r"By I2T step 20 is better .*; without held-out pictures, no score shows whether it has"
        r" learned as much as the last step: look at the images of both\.",
    ),
    "without truth, surely better, and copies more": (
        {"i2t": {20: SURE, 30: 0}, "nearest": {20: SURE, 30: 0}},
        20,
        r"By I2T step 20 is better .*, but worse by memorization, \+10.*: look at the images",
    ),
    "without truth, not surely better, and copies less": (
        {"i2t": {20: UNSURE, 30: 0}, "nearest": {20: -SURE, 30: 0}},
        20,
        r"No step is clearly better than the last \(30\) by I2T .*: keep the last",
    ),
    "one step": ({"i2t": {30: 0}}, 30, r"Only step 30 was scored"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_one_sentence_names_the_best_step(name):
    scores, candidate, sentence = ANSWERS[name]
    (answer,) = answers_of(scores)
    assert (answer.run, answer.last, answer.candidate) == ("dog", 30, candidate)
    assert answer.metric == ("truth" if "truth" in scores else "i2t")
    assert re.match(sentence, answer.sentence)
    both = answers_of(scores, runs=("dog", "cat"))
    assert [answer.sentence.partition(": ")[0] for answer in both] == ["dog", "cat"]


def test_the_interval_of_an_answer_is_wider_if_there_are_more_steps_to_choose_from():
    # The mean is 2.45 standard errors above zero. Half of the interval's width is 2.20 standard
    # errors with one other step, and more than 2.45 with five.
    advantage = 2.45 * 0.01 * (12 / 11) ** 0.5 / 12**0.5
    (of_two,) = answers_of({"truth": {10: advantage, 60: 0}})
    assert of_two.sentence.startswith("By truth step 10 is better")
    steps = {10: advantage, **dict.fromkeys((20, 30, 40, 50), -SURE), 60: 0}
    (of_six,) = answers_of({"truth": steps})
    assert of_six.sentence.startswith("No step is clearly better")


def test_a_single_prompt_does_not_show_that_a_step_is_better():
    (answer,) = answers_of({"truth": {10: SURE, 30: 0}}, count=1)
    assert answer.sentence.startswith("No step is clearly better than the last (30) by truth")
    assert answers_of({"nearest": {10: SURE, 30: 0}}) == [], "memorization must not decide"
