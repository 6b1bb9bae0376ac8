"""Figures of reports: confidence intervals of means, and pictures as files, without a screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .durable import replacing

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A two-sided confidence interval, in the units of what was measured."""

    low: float
    high: float


def student_interval(
    values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE
) -> Interval | None:
    """Interval of the mean by Student's t, by default of 95 %; it is wide where values are few.

    Returns:
        None for fewer than two values, or values that are not finite.
    """
    # Imported late: --help does not wait for it.
    from scipy import stats

    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        return None
    quantile = stats.t.ppf((1 + confidence) / 2, len(array) - 1)
    half_width = float(stats.sem(array) * quantile)
    mean = float(array.mean())
    return Interval(mean - half_width, mean + half_width)


DPI = 120


@contextmanager
def new_figure(path: Path, dpi: int = DPI, **options: Any) -> Iterator[Any]:
    """Yield a matplotlib figure, and write it when the context is left, whole or not at all.

    Args:
        path: a PNG file.
        dpi: dots per inch.
        options: those of `matplotlib.figure.Figure`, such as ``figsize`` and ``layout``.
    """
    # Imported late, as it takes a while. Not pyplot, which keeps figures in memory and asks for a
    # screen.
    from matplotlib.figure import Figure

    figure = Figure(**options)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
