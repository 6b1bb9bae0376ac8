"""The statistics of all results: means, intervals, pairs, win rates, equal training loss.

Pure functions on rows and numbers. Two runs of one seed see the same data and noise, so the effect
of these cancels in the seed's difference; the seeds are the independent samples. Where a subject
has many items, such as prompts, the items are the samples, and an item's values over several seeds
are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.statistics import CONFIDENCE, mean_interval

from .table import Entry, Row, Summary

# The units that are averaged and paired
SEED, ITEM = "seed", "item"
# Start of the name of a metric at one training loss, which depends on all runs of a result
EQUAL_TRAINING = "equal_training"
# Verdicts on a difference
BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


# Seed or item, the unit that is averaged and paired -> its value
Units = Mapping[Any, float | None]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, (n,), n >= 1; rounded once, so that it does not depend on the order."""
    return math.fsum(values) / len(values)


def units(rows: Iterable[Row], unit: str = SEED) -> dict[str, Units]:
    """Group -> seed or item -> its mean value, None where a value is not defined.

    Args:
        rows: of one metric and one step.
        unit: "seed"; a row without one counts by its subject. Or "item", averaged over seeds.
    """
    values: dict[str, dict[Any, list[float | None]]] = {}
    for row in rows:
        if unit == ITEM:
            key = row.item
        elif row.seed is None:
            key = row.subject
        else:
            key = row.seed
        values.setdefault(row.group, {}).setdefault(key, []).append(row.value)

    means: dict[str, Units] = {}
    for group, values_by_unit in values.items():
        group_means: dict[Any, float | None] = {}
        for key, unit_values in values_by_unit.items():
            defined = [value for value in unit_values if value is not None]
            is_complete = len(defined) == len(unit_values)
            group_means[key] = mean(defined) if is_complete else None
        means[group] = group_means
    return means


def summaries(
    rows: Iterable[Row],
    control: str = "",
    unit: str = SEED,
    unpaired: Collection[str] = (),
    confidence: float = CONFIDENCE,
) -> list[Summary]:
    """One summary for each metric, item and step of each group.

    At a step, a value that is not defined leaves the mean undefined, so that the curve has a gap
    there. Of a whole run it is left out of the mean. Means at a step have no interval.

    Args:
        unit: what is averaged and paired. With "item" there is one summary for all items.
        control: the group that the others are compared with; "" for no comparison.
        unpaired: groups that are not compared.
        confidence: level of the differences' intervals.
    """
    parts: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        item = "" if unit == ITEM else row.item
        parts.setdefault((row.metric, item, row.step), []).append(row)
    lines = []
    for (metric, item, step), part in parts.items():
        values = units(part, unit)
        for group, group_values in values.items():
            fields = _average(group_values, step)
            if group != control and group not in unpaired and control in values:
                differences = _difference(group_values, values[control], confidence)
                if differences:
                    fields |= {"control": control, **differences}
            lines.append(Summary(group, metric, item, step, unit, **fields))
    return lines


def _average(values: Units, step: int | None) -> dict[str, Any]:
    """Fields of a `Summary` of these values: count, mean, error and interval."""
    from scipy import stats

    defined = [value for value in values.values() if value is not None]
    if step is not None and len(defined) < len(values):
        return {"count": len(values)}
    if not defined:
        return {}
    error = 0.0
    if len(defined) > 1:
        error = float(stats.sem(defined))  # s / sqrt(n), s with n - 1 degrees of freedom
    low = high = None
    if step is None:
        low, high = mean_interval(defined) or (None, None)
    return {"count": len(defined), "mean": mean(defined), "error": error, "low": low, "high": high}


def _difference(group_values: Units, control_values: Units, confidence: float) -> dict[str, Any]:
    """Fields of a `Summary` of the differences, paired by unit; {} without a pair."""
    differences = []
    for unit, value in group_values.items():
        control_value = control_values.get(unit)
        if value is not None and control_value is not None:
            differences.append(value - control_value)
    if not differences:
        return {}
    low, high = mean_interval(differences, confidence) or (None, None)
    # Equal weights and noise have a difference of exactly 0.
    signs = np.sign(differences)
    return {
        "difference": mean(differences),
        "difference_low": low,
        "difference_high": high,
        "higher": int((signs > 0).sum()),
        "equal": int((signs == 0).sum()),
        "lower": int((signs < 0).sum()),
    }


def verdict(line: Summary, higher_is_better: bool | None) -> str | None:
    """Better, worse or undecided, by the interval of the mean difference; None if undefined."""
    if higher_is_better is None or line.difference is None:
        return None
    low, high = line.difference_low, line.difference_high
    if low is None or high is None or low <= 0 <= high:
        return UNDECIDED
    is_higher = line.difference > 0
    return BETTER if is_higher == higher_is_better else WORSE


def control(subjects: Sequence[Entry], name: str | None, prefer: str | None = "lora") -> str:
    """The group that the others are compared with.

    Args:
        name: ``--control``; by default the first group of the method ``prefer``, else the first
            that is not the base model, else the first.
    """
    labels = list(dict.fromkeys(subject.group for subject in subjects))
    if name is not None:
        if name not in labels:
            hint = did_you_mean(name, labels)
            raise UserError(f'--control is "{name}"{hint}: use one of {", ".join(labels)}.')
        return name
    for subject in subjects:
        if prefer and subject.method == prefer:
            return subject.group
    for subject in subjects:
        if subject.kind != "base":
            return subject.group
    return labels[0]


@dataclass(frozen=True)
class EqualTraining:
    """The training loss at which groups are compared: the lowest that all of their runs reach.

    ``set_by`` is the group of the run that reaches no lower loss.
    """

    training_loss: float
    set_by: str


def final(rows: Iterable[Row], metric: str) -> list[Row]:
    """A row "final METRIC" for each subject: its value at the last step that has one."""
    return [_with_prefix("final", curve[-1]) for curve in _curves(rows, metric)]


def best(rows: Iterable[Row], metric: str, higher_is_better: bool = False) -> list[Row]:
    """A row "best METRIC" for each subject: its best value over training."""
    choose = max if higher_is_better else min
    best_rows = []
    for curve in _curves(rows, metric):
        best_row = choose(curve, key=lambda row: row.value or 0.0)
        best_rows.append(_with_prefix("best", best_row))
    return best_rows


def equal_training(
    rows: Sequence[Row], metric: str, training: str, unpaired: Collection[str] = ()
) -> tuple[EqualTraining | None, list[Row]]:
    """A row "equal_training METRIC" for each subject: its value at one training loss.

    That loss is the lowest that every run of the groups reaches. A group in which a run's training
    loss never fell below its start does not set it: there the other runs would be compared near
    their own start.

    Args:
        training: name of the training loss, which is recorded at the same steps as the metric.
        unpaired: groups that are left out.
    """
    losses = {(row.subject, row.step): row.value for row in rows if row.metric == training}
    paired_rows = [row for row in rows if row.group not in unpaired]
    curves: list[_Curve] = []
    for subject_rows in _curves(paired_rows, metric):
        curve = _Curve([], [])
        for row in subject_rows:
            loss = losses.get((row.subject, row.step))
            if loss is not None:
                curve.rows.append(row)
                curve.losses.append(loss)
        if curve.rows:
            curves.append(curve)

    candidates = []  # (lowest loss of a run, its group)
    groups_without_progress = set()
    for curve in curves:
        lowest = min(curve.losses)
        group = curve.rows[0].group
        candidates.append((lowest, group))
        if lowest == curve.losses[0]:
            groups_without_progress.add(group)
    candidates = [pair for pair in candidates if pair[1] not in groups_without_progress]
    if not candidates:
        return None, []
    # The highest of the runs' lowest losses is the lowest that all of them reach.
    common_loss = EqualTraining(*max(candidates))
    equal_rows = []
    for curve in curves:
        values = [row.value or 0.0 for row in curve.rows]
        value = at_training_loss(curve.losses, values, common_loss.training_loss)
        if value is not None:
            equal_row = _with_prefix(EQUAL_TRAINING, curve.rows[0])
            equal_rows.append(replace(equal_row, value=value))
    return common_loss, equal_rows


class _Curve(NamedTuple):
    """The rows of a subject at the steps at which its training loss was measured too."""

    rows: list[Row]
    losses: list[float]


def at_training_loss(
    training: Sequence[float], measured: Sequence[float], loss: float
) -> float | None:
    """The measured value at which a run's training loss first fell to ``loss``.

    Returns:
        The value, interpolated linearly between the two points around ``loss``; None if the run
        never reached it, or started below it.
    """
    if not len(training) or training[0] < loss:
        return None
    for i in range(len(training) - 1):
        start, end = training[i], training[i + 1]
        if start >= loss >= end:
            share = 0.0  # of the way from this point to the next
            if start > end:
                share = (start - loss) / (start - end)
            return float(measured[i] + share * (measured[i + 1] - measured[i]))
    return None


def _curves(rows: Iterable[Row], metric: str) -> list[list[Row]]:
    """The rows with a value of each subject, in the order of their steps."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric == metric and row.step is not None and row.value is not None:
            curves.setdefault(row.subject, []).append(row)
    return [sorted(curve, key=lambda row: row.step or 0) for curve in curves.values()]


def _with_prefix(prefix: str, row: Row) -> Row:
    """The row as a key figure of the whole run."""
    return replace(row, metric=f"{prefix} {row.metric}", step=None)
