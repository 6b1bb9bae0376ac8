"""The best checkpoint of a run by its scores, in one sentence (``--steps``).

A single score decides. It is the first of these that was measured:

1. ``dino_truth``, then ``truth``: the likeness to held-out pictures. Only this kind of score is low
   both before a run has learned its images and after it has overfitted them.
2. ``i2t``: the likeness to the prompt. It can be high before the run has learned anything, so the
   sentence advises the user to look at the images.

A step counts as better than the last one only if the 95 % interval of their paired difference
excludes zero. This interval is corrected for multiple comparisons, since the best of all steps is
chosen; see :func:`~eval.checkpoints.curves`. The scores in `OBJECTIONS` can object to a better step
but never choose one, because an untrained adapter always has the best memorization and drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..results import compare, report
from ..results.compare import BETTER, WORSE
from ..results.table import Metric, Result, Summary

# Scores that compare images with held-out pictures
TRUTHS = ("dino_truth", "truth")
# The first of these scores that was measured decides.
DECIDING = (*TRUTHS, "i2t")
# Other scores; the sentence names those in which the chosen step is worse than the last one.
OBJECTIONS = ("i2t", "truth", "dino_nearest", "nearest", "drift")


@dataclass(frozen=True)
class BestStep:
    """The best step of one run, and the sentence about it."""

    # Label of the run
    run: str
    # Last step that was scored
    last: int
    # The step that the sentence compares with the last one: the best of the better steps, or the
    # best of all other steps if none is better. It equals ``last`` if no other step was scored.
    candidate: int
    # Name of the score that decides
    metric: str
    sentence: str


def best_steps(curves: Result) -> list[BestStep]:
    """Choose the best step of each run that has a deciding score.

    Args:
        curves: return value of :func:`~eval.checkpoints.curves`.
    """
    answers = []
    for run in curves.groups:
        answer = _answer(curves, run)
        if answer is None:
            continue
        if len(curves.groups) > 1:
            answer = replace(answer, sentence=f"{run}: {answer.sentence}")
        answers.append(answer)
    return answers


def _answer(curves: Result, run: str) -> BestStep | None:
    """Choose the best step of one run; None if no deciding score has a value."""
    name = ""
    points: list[Summary] = []
    for name in DECIDING:
        points = [point for point in curves.over_training(run, name) if point.mean is not None]
        if points:
            break
    if not points:
        return None
    metric = curves.metric(name)
    last = max(point.step or 0 for point in points)
    candidates = [point for point in points if point.step != last]
    if not candidates:
        sentence = f"Only step {last} was scored, so there is no step to choose."
        return BestStep(run, last, last, name, sentence)
    verdicts = [compare.verdict(point, metric.higher_is_better) for point in candidates]
    better = [point for point, word in zip(candidates, verdicts, strict=True) if word == BETTER]
    if better:
        point = _highest(better)
        sentence = _better(curves, run, point, name, last)
    else:
        point = _highest(candidates)
        best_other = f"the best of the others is step {point.step}, {_change(point, metric)}"
        if all(word == WORSE for word in verdicts):
            sentence = (
                f"The last step ({last}) is the best by {metric.title} ({best_other}): keep it."
            )
        else:
            sentence = (
                f"No step is clearly better than the last ({last}) by {metric.title} ({best_other})"
                f"{_other_opinion(curves, run, name)}: keep the last, and look at the images."
            )
    return BestStep(run, last, point.step or 0, name, sentence)


def _better(curves: Result, run: str, point: Summary, name: str, last: int) -> str:
    """Return the sentence on a step that is better than the last one."""
    metric = curves.metric(name)
    start = f"By {metric.title} step {point.step} is better than the last ({last})"
    start += f", {_change(point, metric)}"
    objections = []
    for other_name in OBJECTIONS:
        other_metric = curves.metric(other_name)
        for line in curves.over_training(run, other_name):
            is_worse = compare.verdict(line, other_metric.higher_is_better) == WORSE
            if line.step == point.step and other_name != name and is_worse:
                objections.append(f"by {other_metric.title}, {_change(line, other_metric)}")
    if objections:
        return f"{start}, but worse {' and '.join(objections)}: look at the images of both."
    if name in TRUTHS:
        return f"{start}: take it, and look at the images of both."
    return (
        f"{start}; without held-out pictures, no score shows whether it has learned as much as the"
        " last step: look at the images of both."
    )


def _other_opinion(curves: Result, run: str, name: str) -> str:
    """Return a clause on a step that is better than the last one by CLIP I2T; "" if none is.

    It is also "" if CLIP I2T is the deciding score.
    """
    if name == "i2t":
        return ""
    metric = curves.metric("i2t")
    better = []
    for point in curves.over_training(run, "i2t"):
        if compare.verdict(point, metric.higher_is_better) == BETTER:
            better.append(point)
    if not better:
        return ""
    point = _highest(better)
    return f", though step {point.step} is better by {metric.title} ({_change(point, metric)})"


def _highest(points: Sequence[Summary]) -> Summary:
    """Return the first point with the highest mean; higher is better for all `DECIDING` scores."""
    return max(points, key=lambda point: point.mean or 0.0)


def _change(point: Summary, metric: Metric) -> str:
    """Format the difference from the last step and its interval, without the number of prompts."""
    return report.difference(point, replace(metric, higher_is_better=None))
