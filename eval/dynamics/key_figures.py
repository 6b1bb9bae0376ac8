"""Key figures of recorded curves: when weights settle, how far the adapters are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from bilora_diffusion.train.dynamics import COLUMNS, COSINE, GAIN, RATIO, ROWS

from ..table import Row
from .courses import CROSS

LEVEL = 0.9
"""The cosine to the final weights at which they count as settled."""


def key_figures(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    """Figures of each run's curves at the steps that all runs of its group have.

    Of cosines to the own final weights "settled NAME", the step from which on it is ``LEVEL`` or
    more, and "start NAME", its first value; how much later the auxiliary settles, "lag product"
    and "lag factors", and after which "share" of all steps. Of the ratio "lowest", "median" and
    "highest". Of the cosine to the other's final weights the "largest" by absolute value; of
    overlaps, cosine and gain "final" and "mean".

    Args:
        rows: of all runs over training.
        steps: of each group's runs.
    """
    curves: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row.step is not None and not row.item:
            runs = curves.setdefault((row.group, row.metric), {})
            runs.setdefault(row.subject, {})[row.step] = row
    figures = []
    for (_, name), runs in curves.items():
        common = sorted(set.intersection(*map(set, runs.values())))
        for values in runs.values():
            points = [values[step] for step in common]
            for what, value in _figures(name, points).items():
                any_row = next(iter(values.values()))
                figures.append(replace(any_row, metric=f"{what} {name}", step=None, value=value))
    return figures + _lags(figures, steps)


def _figures(name: str, points: Sequence[Row]) -> dict[str, float | None]:
    values = [row.value for row in points if row.value is not None]
    if name == RATIO:
        middle = median(values) if values else None
        return {"lowest": min(values, default=None), "median": middle} | {
            "highest": max(values, default=None)
        }
    if name in (f"{CROSS}/factors", f"{CROSS}/product"):
        return {"largest": max(map(abs, values), default=None)}
    if name in (GAIN, COLUMNS, ROWS, COSINE):
        last = values[-1] if values else None
        return {"final": last, "mean": sum(values) / len(values) if values else None}
    if "/" in name and not name.startswith(CROSS):
        settled = settles([row.step or 0 for row in points], [row.value for row in points], LEVEL)
        return {"settled": settled, "start": next(iter(values), None)}
    return {}


def _lags(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    settled = {(row.subject, row.metric): row.value for row in rows}
    figures = []
    for row in rows:
        if row.metric in ("settled auxiliary/product", "settled auxiliary/factors"):
            what = row.metric.rpartition("/")[2]
            first, last = settled[row.subject, f"settled primary/{what}"], row.value
            lag = None if first is None or last is None else last - first
            share = None if last is None else last / steps[row.group]
            figures.append(replace(row, metric=f"lag {what}", value=lag))
            figures.append(replace(row, metric=f"share {what}", value=share))
    return figures


def settles(steps: Sequence[int], values: Sequence[float | None], level: float) -> float | None:
    """The step from which on a curve stays at ``level`` or above.

    Interpolated linearly between the last point below and the next; the first step that has a
    value where none is below; None where the last point is below.
    """
    points = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
    below = [i for i, (_, value) in enumerate(points) if value < level]
    if not below:
        return float(points[0][0]) if points else None
    if below[-1] == len(points) - 1:
        return None
    (left, low), (right, high) = points[below[-1]], points[below[-1] + 1]
    return left + (right - left) * (level - low) / (high - low)
