"""A metric over the steps of a run, smoothed and thinned out for a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Row = Mapping[str, Any]
# (step, value), by step.
Points = list[tuple[int, float]]
# Points of a line, about.
MAX_POINTS = 400


def series(rows: Sequence[Row], key: str) -> Points:
    """A metric over the steps, without rows that lack it or have null for a non-finite number."""
    points = []
    for row in rows:
        if type(row.get(key)) in (int, float):  # and not bool, which is an int
            points.append((row["step"], float(row[key])))
    return points


def smooth(points: Points, window: int) -> Points:
    """The mean of each value and up to `window - 1` values before it."""
    values = pd.Series([value for _, value in points], dtype=float)
    means = values.rolling(max(1, window), min_periods=1).mean()
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """Thin a curve out to about `limit` points, such that its length and its peaks stay.

    These are the first and the last point, and the lowest and the highest of equal stretches.
    """
    if len(points) <= limit:
        return points
    chosen = {0, len(points) - 1}
    values = np.asarray([value for _, value in points])
    for stretch in np.array_split(np.arange(len(points)), limit // 2):  # numbers of points
        chosen.add(int(stretch[values[stretch].argmin()]))
        chosen.add(int(stretch[values[stretch].argmax()]))
    return [points[number] for number in sorted(chosen)]
