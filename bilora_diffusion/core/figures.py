"""Figures of reports: confidence intervals of means, and pictures as files, without a screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .durable import replacing

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


DPI = 120


@contextmanager
def new_figure(path: Path, dpi: int = DPI, **options: Any) -> Iterator[Any]:
    """A matplotlib figure, which is written at the end, whole or not at all.

    Args:
        path: a PNG file.
        options: those of `matplotlib.figure.Figure`, such as ``figsize`` and ``layout``.
    """
    # Not pyplot: it would keep the figure in memory, and ask for a screen. Imported here, as it
    # takes a while.
    from matplotlib.figure import Figure

    figure = Figure(**options)
    yield figure
    with replacing(path) as aside:
        figure.savefig(aside, dpi=dpi)
