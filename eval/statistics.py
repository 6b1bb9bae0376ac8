"""Paired comparisons over seeds: differences, bootstrap intervals, equal training loss.

Pure functions on numbers. Two runs of one seed see the same data and noise, so a seed's difference
is free of what the two have in common; the seeds are the independent draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
RNG_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, in the units of what was measured."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """An arm minus the control, over the seeds that both have.

    Args:
        mean: mean of the differences.
        interval: of that mean; None for a single seed.
        better: seeds in which the arm is better; a tie is not.
        seeds: how many seeds were compared.
    """

    mean: float
    interval: Interval | None
    better: int
    seeds: int


def bootstrap_interval(
    values: Sequence[float],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = RNG_SEED,
) -> Interval | None:
    """Interval of the mean of independent values by ``scipy.stats.bootstrap`` (BCa).

    Where all values are equal, for which BCa is not defined, it has no width. Where it is not
    defined otherwise, the percentile interval stands in. With few values a bootstrap interval is
    too narrow: of 95 % intervals of normal values, 72 % cover the mean for 3, 84 % for 5 and 91 %
    for 10.

    Args:
        values: (n,), finite.
        level: nominal coverage.
        resamples: bootstrap samples.
        seed: of the resampling, so that the same values give the same interval.

    Returns:
        The interval; None below two values.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return None
    # Equal up to rounding: what is left of differences of equal numbers has no distribution.
    if np.ptp(array) <= 1e-12 * np.abs(array).max():
        return Interval(float(array.mean()), float(array.mean()))
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the degenerate case is handled by the second method
            found = stats.bootstrap(
                (array,),
                np.mean,
                confidence_level=level,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            return Interval(float(found.low), float(found.high))
    return None


def paired_difference(
    arm: Mapping[int, float], control: Mapping[int, float], *, higher_is_better: bool = False
) -> Paired | None:
    """``arm - control`` over the seeds that both have.

    Args:
        arm: seed -> value.
        control: seed -> value.
        higher_is_better: what counts as better.

    Returns:
        The comparison; None without a common seed.
    """
    seeds = sorted(arm.keys() & control.keys())
    if not seeds:
        return None
    differences = [arm[seed] - control[seed] for seed in seeds]
    sign = 1 if higher_is_better else -1
    return Paired(
        mean=float(np.mean(differences)),
        interval=bootstrap_interval(differences),
        better=sum(sign * difference > 0 for difference in differences),
        seeds=len(seeds),
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard error of the mean, (n,); the error of one value is 0, None without any."""
    if not len(values):
        return None
    error = float(stats.sem(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), error


def columns(
    rows: Sequence[Sequence[float | None]],
) -> tuple[list[float | None], list[float | None]]:
    """Mean and standard error of each column of (rows, columns); None where a value is missing."""
    found: list[tuple[float | None, float | None]] = []
    for column in zip(*rows, strict=True):
        whole = [value for value in column if value is not None]
        both = mean_and_error(whole) if len(whole) == len(column) else None
        found.append(both or (None, None))
    return [middle for middle, _ in found], [error for _, error in found]


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None without values."""
    return float(np.mean(values)) if len(values) else None


def reached_training_loss(training: Sequence[float]) -> float | None:
    """The lowest training loss of a run; None where it never fell below its first value."""
    return min(training) if len(training) > 1 and min(training) < training[0] else None


def at_training_loss(
    training: Sequence[float], measured: Sequence[float], level: float
) -> float | None:
    """What was measured when a run's training loss first fell to ``level``.

    Args:
        training: (points,) training loss over training; need not fall at every point.
        measured: (points,) what was measured at the same steps.
        level: a training loss.

    Returns:
        The value, interpolated linearly between the two points around ``level``; None where the
        run never came down to it, or began below.
    """
    if not len(training) or training[0] < level:
        return None
    for i in range(len(training) - 1):
        above, below = training[i], training[i + 1]
        if above >= level >= below:
            part = (above - level) / (above - below) if above > below else 0.0
            return float(measured[i] + part * (measured[i + 1] - measured[i]))
    return None
