"""Functions that read, smooth and thin out a metric over the steps of a run, for a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Row = Mapping[str, Any]
# (step, value) pairs, sorted by step
Points = list[tuple[int, float]]
# Approximate maximum number of points of a line
MAX_POINTS = 400


def series(rows: Sequence[Row], key: str) -> Points:
    """Return a metric over the steps, without rows in which it is missing or null (not finite)."""
    points = []
    for row in rows:
        if type(row.get(key)) in (int, float):  # bool is a subclass of int
            points.append((row["step"], float(row[key])))
    return points


def smooth(points: Points, window: int) -> Points:
    """Return the running mean, which averages each value with up to `window - 1` before it."""
    values = pd.Series([value for _, value in points], dtype=float)
    means = values.rolling(max(1, window), min_periods=1).mean()
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """Reduce a curve to about `limit` points without losing its ends and peaks.

    The result has the first and the last point, and the lowest and the highest point of each of
    `limit // 2` equal sections.
    """
    if len(points) <= limit:
        return points
    chosen = {0, len(points) - 1}
    values = np.asarray([value for _, value in points])
    for section in np.array_split(np.arange(len(points)), limit // 2):  # indices of points
        chosen.add(int(section[values[section].argmin()]))
        chosen.add(int(section[values[section].argmax()]))
    return [points[index] for index in sorted(chosen)]
