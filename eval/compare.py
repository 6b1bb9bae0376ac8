"""The statistics of all results: means, intervals, pairs, win rates, equal training loss.

Pure functions on rows and numbers. Two runs of one seed see the same data and noise, so a seed's
difference is free of what the two have in common; the seeds are the independent draws. Where a
subject is asked many things, such as prompts, these are the draws, and their values over several
seeds are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.figures import LEVEL, Interval

from .table import Entry, Row, Summary

SEED, ITEM = "seed", "item"
RESAMPLES = 9999
BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


OfMean = Callable[[Sequence[float]], Interval | None]
Units = Mapping[Any, float | None]
"""Seed or item, which is averaged and paired -> its value."""


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of independent values by a bias-corrected, accelerated bootstrap.

    BCa (Efron, "Better Bootstrap Confidence Intervals", 1987) over all n**n resamples of up to
    five values, and over 9999 random resamples of more. The order of the values has no influence,
    and the interval follows their unit and offset. ``scipy.stats.bootstrap`` compares the resampled
    means with the mean exactly: of few values many are equal to it, and rounding would decide.

    Equal values have an interval without width, since BCa is not defined for them. With few values
    a bootstrap interval is too narrow: of 95 % intervals of normal values, 72 % cover the mean for
    3, 84 % for 5 and 90 % for 10.
    """
    from scipy.special import ndtr, ndtri  # in functions, so that --help does not wait for it

    array = np.sort(np.asarray(values, dtype=np.float64))
    count = len(array)
    if count < 2 or not np.isfinite(array).all():
        return None
    center, spread = float(array.mean()), float(np.ptp(array))
    # Equal up to rounding: what is left of differences of equal numbers has no distribution.
    if spread <= 1e-12 * np.abs(array).max():
        return Interval(center, center)
    deviations = (array - center) / spread

    if count**count <= RESAMPLES:
        indices = np.indices((count,) * count).reshape(count, -1).T  # (resamples, n)
    else:
        indices = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    means = deviations[indices].mean(axis=1)  # (resamples,); 0 is the mean of the values

    # z0 = Phi^-1(share of resampled means below the mean); ties count half.
    is_tie = np.abs(means) < 1e-9
    is_below = (means < 0) & ~is_tie
    bias = ndtri(is_below.mean() + is_tie.mean() / 2)
    # a = sum(d^3) / (6 sum(d^2)^1.5), the jackknife's acceleration of a mean.
    acceleration = np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5)
    # The levels of the bounds: Phi(z0 + (z0 + z) / (1 - a (z0 + z))).
    shifted = bias + ndtri([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    levels = ndtr(bias + shifted / (1 - acceleration * shifted))

    # No interpolation: the few means that five values can have are far apart.
    low, high = np.quantile(means, levels, method="averaged_inverted_cdf")
    return Interval(center + spread * float(low), center + spread * float(high))


def win_rate_interval(wins: int, ties: int, losses: int) -> Interval | None:
    """95 % interval of (wins + ties / 2) / n; None where there are ties and fewer than two pairs.

    Wilson's interval of a proportion where there is no tie; it has width even where all pairs are
    won. With ties the rate is no proportion, and the interval is a bootstrap over the pairs'
    1, 1/2 and 0.
    """
    from scipy import stats

    if ties:
        return bootstrap_interval([1.0] * wins + [0.5] * ties + [0.0] * losses)
    proportion = stats.binomtest(wins, wins + losses).proportion_ci(LEVEL, method="wilson")
    return Interval(float(proportion.low), float(proportion.high))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, (n,), n >= 1; rounded once, so that the order of values does not show."""
    return math.fsum(values) / len(values)


def units(rows: Iterable[Row], over: str = SEED) -> dict[str, Units]:
    """Group -> seed or item -> its mean value, None where a value is not defined.

    Args:
        rows: of one metric and one step.
        over: "seed"; a row without one counts by its subject. Or "item", averaged over seeds.
    """
    values: dict[str, dict[Any, list[float | None]]] = {}
    for row in rows:
        unit = row.item if over == ITEM else row.subject if row.seed is None else row.seed
        values.setdefault(row.group, {}).setdefault(unit, []).append(row.value)
    return {
        group: {unit: _mean(unit_values) for unit, unit_values in by_unit.items()}
        for group, by_unit in values.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return mean(defined) if len(defined) == len(values) else None


def summaries(
    rows: Iterable[Row],
    control: str = "",
    over: str = SEED,
    unpaired: Collection[str] = (),
    interval: OfMean = bootstrap_interval,
) -> list[Summary]:
    """One summary for each metric, item and step of each group.

    At a step a value that is not defined leaves the mean undefined, so that a curve has a gap; of
    the whole run it is left out. Means at a step have an error and no interval.

    Args:
        over: what is averaged and paired; where it is "item", items are not told apart.
        control: the group that the others are compared with; "" for no comparison.
        unpaired: groups that can't be.
        interval: of a mean.
    """
    parts: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.metric, "" if over == ITEM else row.item, row.step), []).append(row)
    lines = []
    for (metric, item, step), part in parts.items():
        values = units(part, over)
        for group, group_values in values.items():
            is_compared = group != control and group not in unpaired
            control_values = values.get(control, {}) if is_compared else {}
            numbers = _average(group_values, step, interval)
            difference = _difference(group_values, control_values, interval)
            if difference:
                numbers |= {"control": control, **difference}
            lines.append(Summary(group, metric, item, step, over, **numbers))
    return lines


def _average(values: Units, step: int | None, interval: OfMean) -> dict[str, Any]:
    from scipy import stats

    defined = [value for value in values.values() if value is not None]
    if step is not None and len(defined) < len(values):
        return {"count": len(values)}
    if not defined:
        return {}
    error = float(stats.sem(defined)) if len(defined) > 1 else 0.0
    bounds = interval(defined) if step is None else None
    low, high = bounds or (None, None)
    return {"count": len(defined), "mean": mean(defined), "error": error, "low": low, "high": high}


def _difference(group_values: Units, control_values: Units, interval: OfMean) -> dict[str, Any]:
    values = []
    for unit, value in group_values.items():
        control_value = control_values.get(unit)
        if value is not None and control_value is not None:
            values.append(value - control_value)
    if not values:
        return {}
    low, high = interval(values) or (None, None)
    return {
        "difference": mean(values),
        "difference_low": low,
        "difference_high": high,
        "higher": sum(value > 0 for value in values),
        "equal": sum(value == 0 for value in values),
        "lower": sum(value < 0 for value in values),
    }


def verdict(line: Summary, higher_is_better: bool | None) -> str | None:
    """Better, worse or neither, by the interval of the mean difference; None if undefined."""
    if higher_is_better is None or line.difference is None:
        return None
    low, high = line.difference_low, line.difference_high
    if low is None or high is None or low <= 0 <= high:
        return UNDECIDED
    return BETTER if (line.difference > 0) == higher_is_better else WORSE


def control(subjects: Sequence[Entry], name: str | None, prefer: str | None = "lora") -> str:
    """The group that the others are compared with.

    Args:
        name: ``--control``; None for the first group of the method ``prefer``, else the first
            that is not the base model, else the first.
    """
    labels = list(dict.fromkeys(subject.group for subject in subjects))
    if name is not None and name not in labels:
        raise UserError(
            f'--control is "{name}"{did_you_mean(name, labels)}: use one of {", ".join(labels)}.'
        )
    preferred = [subject.group for subject in subjects if prefer and subject.method == prefer]
    trained = [subject.group for subject in subjects if subject.kind != "base"]
    return name or [*preferred, *trained, *labels][0]


@dataclass(frozen=True)
class EqualTraining:
    """The training loss at which groups are compared: the lowest that all of their runs reach."""

    training_loss: float
    set_by: str


def final(rows: Iterable[Row], metric: str) -> list[Row]:
    """For each subject a row "final METRIC": its value at the last step that has one."""
    return [_derived(curve[-1], "final") for curve in _curves(rows, metric)]


def best(rows: Iterable[Row], metric: str, higher_is_better: bool = False) -> list[Row]:
    """For each subject a row "best METRIC": the best value over training."""
    choose = max if higher_is_better else min
    best_rows = []
    for curve in _curves(rows, metric):
        best_row = choose(curve, key=lambda row: row.value or 0.0)
        best_rows.append(_derived(best_row, "best"))
    return best_rows


def equal_training(
    rows: Sequence[Row], metric: str, training: str, unpaired: Collection[str] = ()
) -> tuple[EqualTraining | None, list[Row]]:
    """For each subject a row "equal_training METRIC": its value at a level of the training loss.

    The level is the lowest that every run of the groups reaches. A group in which a run's training
    loss never fell below its start is left aside: it would take all others back to the start.
    """
    losses = {(row.subject, row.step): row.value for row in rows if row.metric == training}
    curves: list[_Curve] = []
    for subject_rows in _curves([row for row in rows if row.group not in unpaired], metric):
        curve = _Curve([], [])
        for row in subject_rows:
            loss = losses.get((row.subject, row.step))
            if loss is not None:
                curve.rows.append(row)
                curve.losses.append(loss)
        if curve.rows:
            curves.append(curve)

    # group -> the lowest loss of each run, None of one that never fell
    reached: dict[str, list[float | None]] = {}
    for curve in curves:
        lowest = min(curve.losses)
        fell = lowest < curve.losses[0]
        reached.setdefault(curve.rows[0].group, []).append(lowest if fell else None)
    candidates = []
    for group, values in reached.items():
        if None not in values:
            candidates += [(value, group) for value in values if value is not None]
    if not candidates:
        return None, []
    level = EqualTraining(*max(candidates))
    derived = []
    for curve in curves:
        measured = [row.value or 0.0 for row in curve.rows]
        value = at_training_loss(curve.losses, measured, level.training_loss)
        if value is not None:
            derived.append(replace(_derived(curve.rows[0], "equal_training"), value=value))
    return level, derived


class _Curve(NamedTuple):
    """The rows of a subject at which its training loss was measured, too, and these losses."""

    rows: list[Row]
    losses: list[float]


def at_training_loss(
    training: Sequence[float], measured: Sequence[float], level: float
) -> float | None:
    """Measurement at which a run's training loss first fell to ``level``.

    Returns:
        The value, interpolated linearly between the two points around ``level``; None where the
        run never came down to it, or began below.
    """
    if not len(training) or training[0] < level:
        return None
    for i in range(len(training) - 1):
        start, end = training[i], training[i + 1]
        if start >= level >= end:
            share = (start - level) / (start - end) if start > end else 0.0
            return float(measured[i] + share * (measured[i + 1] - measured[i]))
    return None


def _curves(rows: Iterable[Row], metric: str) -> list[list[Row]]:
    """The defined rows of each subject over training, in order."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric == metric and row.step is not None and row.value is not None:
            curves.setdefault(row.subject, []).append(row)
    return [sorted(curve, key=lambda row: row.step or 0) for curve in curves.values()]


def _derived(row: Row, prefix: str) -> Row:
    return replace(row, metric=f"{prefix} {row.metric}", step=None)
