"""Statistics of results: means, intervals, paired differences, wins, and equal training loss.

The functions are pure: they take rows and numbers and return new ones. Two runs with the same seed
see the same data and noise, whose effect cancels in the difference between the runs; the seeds are
the independent samples. With the unit "item", the items, such as prompts, are the samples, and the
values of an item are first averaged over seeds.
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
# Prefix of metrics at equal training loss; this loss depends on all runs of a result
EQUAL_TRAINING = "equal_training"
# Results of a comparison with the control
BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


# Seed or item, the unit that is averaged and paired -> its value
Units = Mapping[Any, float | None]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one value; the order of the values does not matter.

    The sum is exact (`math.fsum`).
    """
    return math.fsum(values) / len(values)


def units(rows: Iterable[Row], unit: str = SEED) -> dict[str, Units]:
    """Return the mean value of each seed or item, by group.

    A mean is None if one of its values is not defined.

    Args:
        rows: rows of one metric and one step, and of one item if the unit is "seed".
        unit: "seed", where a row without a seed counts by its subject; or "item", where the values
            of an item are averaged over seeds.
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
    """Return a summary for each metric, item and step of each group.

    If a value at a step is not defined, the mean at this step is not defined either, and the curve
    has a gap. For metrics without a step, undefined values are left out of the mean. Means at a
    step have no interval.

    Args:
        rows: rows of any metrics.
        control: group that the others are compared with; "" for no comparison.
        unit: unit that is averaged and paired, "seed" or "item". With "item", one summary covers
            all items.
        unpaired: groups that are not compared with the control.
        confidence: level of the intervals of differences.
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
    """Return the fields of a `Summary` for these values: count, mean, error and interval."""
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
    """Return the fields of a `Summary` for the differences, paired by unit; {} without a pair."""
    differences = []
    for unit, value in group_values.items():
        control_value = control_values.get(unit)
        if value is not None and control_value is not None:
            differences.append(value - control_value)
    if not differences:
        return {}
    low, high = mean_interval(differences, confidence) or (None, None)
    # With equal weights and noise, the difference is exactly 0.
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
    """Return better, worse or undecided, by the interval of the mean difference.

    The result is None for a metric without a direction, or without a difference.
    """
    if higher_is_better is None or line.difference is None:
        return None
    low, high = line.difference_low, line.difference_high
    if low is None or high is None or low <= 0 <= high:
        return UNDECIDED
    is_higher = line.difference > 0
    return BETTER if is_higher == higher_is_better else WORSE


def control(subjects: Sequence[Entry], name: str | None, prefer: str | None = "lora") -> str:
    """Return the group that the others are compared with.

    Args:
        subjects: subjects of the result.
        name: value of ``--control``. For None, the control is the first group of the method
            ``prefer``, else the first group that is not the base model, else the first group.
        prefer: name of the preferred method; None if there is no preference.
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
    """The training loss at which groups are compared; see `equal_training`.

    ``set_by`` is the group of the run whose lowest loss this is.
    """

    training_loss: float
    set_by: str


def final(rows: Iterable[Row], metric: str) -> list[Row]:
    """Return a row "final METRIC" for each subject: the value at the last step that has one."""
    return [_with_prefix("final", curve[-1]) for curve in _curves(rows, metric)]


def best(rows: Iterable[Row], metric: str, higher_is_better: bool = False) -> list[Row]:
    """Return a row "best METRIC" for each subject: the best value over training."""
    choose = max if higher_is_better else min
    best_rows = []
    for curve in _curves(rows, metric):
        best_row = choose(curve, key=lambda row: row.value or 0.0)
        best_rows.append(_with_prefix("best", best_row))
    return best_rows


def equal_training(
    rows: Sequence[Row], metric: str, training: str, unpaired: Collection[str] = ()
) -> tuple[EqualTraining | None, list[Row]]:
    """Return a row "equal_training METRIC" for each subject: the value at a common training loss.

    The common loss is the lowest training loss that the runs of all groups reach. It ignores a
    group if the training loss of one of its runs never fell below the first value, since the other
    runs would otherwise be compared near their start.

    Args:
        rows: rows of both metrics over training.
        metric: name of the metric.
        training: name of the training loss, which is recorded at the same steps as the metric.
        unpaired: groups that are left out.

    Returns:
        The common loss and the rows; (None, []) if no group can set the common loss. A subject
        whose training loss does not cross the common loss has no row.
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
    # The highest of the runs' lowest losses is the lowest loss that all of them reach.
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
    """A subject's rows and training losses, at the steps that have both."""

    rows: list[Row]
    losses: list[float]


def at_training_loss(
    training: Sequence[float], measured: Sequence[float], loss: float
) -> float | None:
    """Return the measured value at the point where a run's training loss first fell to ``loss``.

    Args:
        training: training losses of the run, in the order of steps.
        measured: values of the metric at the same steps.
        loss: the common training loss.

    Returns:
        The value, interpolated linearly between the two points around ``loss``; None if the run
        never reached this loss, or started below it.
    """
    if not len(training) or training[0] < loss:
        return None
    for i in range(len(training) - 1):
        start, end = training[i], training[i + 1]
        if start >= loss >= end:
            share = 0.0  # fraction of the distance from this point to the next
            if start > end:
                share = (start - loss) / (start - end)
            return float(measured[i] + share * (measured[i + 1] - measured[i]))
    return None


def _curves(rows: Iterable[Row], metric: str) -> list[list[Row]]:
    """Return the rows of each subject that have a value, sorted by step."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric == metric and row.step is not None and row.value is not None:
            curves.setdefault(row.subject, []).append(row)
    return [sorted(curve, key=lambda row: row.step or 0) for curve in curves.values()]


def _with_prefix(prefix: str, row: Row) -> Row:
    """Return the row as a metric of the whole run, with a prefix and without a step."""
    return replace(row, metric=f"{prefix} {row.metric}", step=None)
