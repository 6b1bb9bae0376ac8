"""Confidence intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """A two-sided confidence interval, in the units of what was measured."""

    low: float
    high: float


def student_interval(values: Sequence[float] | np.ndarray) -> Interval | None:
    """95 % interval of the mean by Student's t, wide where values are few; None where it is not
    defined.
    """
    from scipy import stats  # here, so that a command's --help does not wait for it

    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        return None
    reach = float(stats.sem(array) * stats.t.ppf((1 + LEVEL) / 2, len(array) - 1))
    return Interval(float(array.mean()) - reach, float(array.mean()) + reach)
