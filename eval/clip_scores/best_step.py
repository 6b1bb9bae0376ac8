"""The best checkpoint of a run by its scores, in one sentence (``--steps``).

One score decides, the first of these that was measured:

1. ``dino_truth``, then ``truth``: the likeness to held-out pictures. It is the only kind of score
   that is low both before a run has learned its images and after it has overfitted them.
2. ``i2t``: the likeness to the prompt. It can be high before anything is learned, so the sentence
   asks for a look at the images.

A step is better than the last one only if the interval of their paired difference leaves out zero.
This interval is wide enough for the choice among all steps; see :func:`~eval.checkpoints.curves`.
The other scores of `OBJECTIONS` can object to a better step, and never choose one: before training,
memorization is lowest and the base model least changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..results import compare, report
from ..results.compare import BETTER, WORSE
from ..results.table import Metric, Result, Summary

# The first of them that was measured decides.
TRUTHS = ("dino_truth", "truth")
DECIDING = (*TRUTHS, "i2t")
# Scores in which a better step may be worse than the last one
OBJECTIONS = ("i2t", "truth", "dino_nearest", "nearest", "drift")


@dataclass(frozen=True)
class BestStep:
    """The answer of one run's scores."""

    # Label of the run
    run: str
    # Last step that was scored
    last: int
    # The step that the sentence compares with the last one: a better one, else the best of the
    # others; the last one itself where no other was scored
    candidate: int
    # Name of the score that decides
    metric: str
    sentence: str


def best_steps(curves: Result) -> list[BestStep]:
    """The answer of each run that has a score.

    Args:
        curves: of :func:`~eval.checkpoints.curves`.
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
    """The answer of one run; None if no score that decides has a value."""
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
        sentence = f"Only step {last} was scored, so there is none to choose."
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
                f"No step is surely better than the last ({last}) by {metric.title} ({best_other})"
                f"{_other_opinion(curves, run, name)}: keep the last, and look at the images."
            )
    return BestStep(run, last, point.step or 0, name, sentence)


def _better(curves: Result, run: str, point: Summary, name: str, last: int) -> str:
    """The sentence on a step that is better than the last one."""
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
        f"{start}; without held-out pictures no score shows whether it has learned as much: look at"
        " the images of both."
    )


def _other_opinion(curves: Result, run: str, name: str) -> str:
    """A clause on a step that is better than the last by CLIP I2T alone; "" without one."""
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
    return f", though step {point.step} is by {metric.title}, {_change(point, metric)}"


def _highest(points: Sequence[Summary]) -> Summary:
    """The point with the highest mean, the first of equal ones. Higher is better in `DECIDING`."""
    return max(points, key=lambda point: point.mean or 0.0)


def _change(point: Summary, metric: Metric) -> str:
    """The difference to the last step with its interval, without the number of better prompts."""
    return report.difference(point, replace(metric, higher_is_better=None))
