"""Confidence intervals of means, of held-out losses and of whatever is evaluated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL, RESAMPLES = 0.95, 9999


class Interval(NamedTuple):
    """A two-sided confidence interval, in the units of what was measured."""

    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """95 % interval of the mean of independent values by ``scipy.stats.bootstrap`` (BCa).

    Where all values are equal, for which BCa is not defined, it has no width. Where it is not
    defined otherwise, the percentile interval stands in. With few values a bootstrap interval is
    too narrow: of 95 % intervals of normal values, 72 % cover the mean for 3, 84 % for 5 and 91 %
    for 10.
    """
    from scipy import stats  # here, so that a command's --help does not wait for it

    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return None
    # Equal up to rounding: what is left of differences of equal numbers has no distribution.
    if np.ptp(array) <= 1e-12 * np.abs(array).max():
        return Interval(float(array.mean()), float(array.mean()))
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the degenerate case is handled by the second method
            interval = stats.bootstrap(
                (array,),
                np.mean,
                confidence_level=LEVEL,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            return Interval(float(interval.low), float(interval.high))
    return None
