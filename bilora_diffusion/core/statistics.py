"""Confidence intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
# From so many values on, the interval is a bootstrap.
BOOTSTRAP_FROM = 20
RESAMPLES = 9999
# Resampled values that are in memory at a time
BATCH_VALUES = 10_000_000


class Interval(NamedTuple):
    """A two-sided confidence interval, in the units of what was measured."""

    low: float
    high: float


def mean_interval(
    values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE
) -> Interval | None:
    """Interval of the mean of independent values, such as paired differences; by default of 95 %.

    Fewer than `BOOTSTRAP_FROM` values, such as training seeds, have Student's t, which covers the
    mean of normal values in 95 % of all samples, however few they are. More, such as prompts, have
    a bias-corrected and accelerated bootstrap (BCa; Efron, "Better Bootstrap Confidence Intervals",
    1987), which follows skewed values; it covers the mean of 20 normal values in 92 %, of 5 it
    would in 84 %.

    The order of the values has no influence, and the interval follows their unit and offset. Equal
    values have an interval without width.

    Returns:
        None for fewer than two values, or values that are not finite.
    """
    # Imported lazily: --help must not wait for it.
    from scipy import stats

    array = np.sort(np.asarray(values, dtype=np.float64))
    count = len(array)
    if count < 2 or not np.isfinite(array).all():
        return None
    center = float(array.mean())
    spread = float(np.ptp(array))
    # Values that are equal but for rounding have no distribution.
    if spread <= 1e-12 * np.abs(array).max():
        return Interval(center, center)
    if count < BOOTSTRAP_FROM:
        quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
        half_width = float(stats.sem(array) * quantile)
        return Interval(center - half_width, center + half_width)

    def rounded_mean(sample: np.ndarray, axis: int) -> np.ndarray:
        """Mean, rounded so that a resample with the mean of the values counts as a tie."""
        return np.round(sample.mean(axis=axis), 9)

    low, high = stats.bootstrap(
        ((array - center) / spread,),
        rounded_mean,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // count),
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(center + spread * float(low), center + spread * float(high))
