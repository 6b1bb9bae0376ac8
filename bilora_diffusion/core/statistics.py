"""Confidence intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
# Minimum number of values for a bootstrap interval.
BOOTSTRAP_FROM = 20
RESAMPLES = 9999
# Maximum number of resampled values in memory at a time.
BATCH_VALUES = 10_000_000


class Interval(NamedTuple):
    """A two-sided confidence interval, in the units of the measured values."""

    low: float
    high: float


def mean_interval(
    values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return the interval (by default 95 %) of the mean of independent values.

    The values may be paired differences. With fewer than `BOOTSTRAP_FROM` values, such as training
    seeds, the method is Student's t interval: for normal values its coverage is 95 % even with two
    values. With more values, such as prompts, it is the bias-corrected and accelerated bootstrap
    (BCa; Efron, "Better Bootstrap Confidence Intervals", 1987), which adapts to skewed values. For
    normal values its coverage is 92 % with 20 values, and would be 84 % with 5.

    The interval does not depend on the order of the values, and it shifts and scales with them. For
    equal values its width is 0.

    Returns:
        The interval; None for fewer than two values, or if a value is not finite.
    """
    # Imported lazily: --help must not wait for it.
    from scipy import stats

    array = np.sort(np.asarray(values, dtype=np.float64))
    count = len(array)
    if count < 2 or not np.isfinite(array).all():
        return None
    center = float(array.mean())
    spread = float(np.ptp(array))
    # Values that differ only by rounding have no distribution to resample.
    if spread <= 1e-12 * np.abs(array).max():
        return Interval(center, center)
    if count < BOOTSTRAP_FROM:
        quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
        half_width = float(stats.sem(array) * quantile)
        return Interval(center - half_width, center + half_width)

    def rounded_mean(sample: np.ndarray, axis: int) -> np.ndarray:
        """Return the mean, rounded so that a resample with the mean of all values is a tie."""
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
