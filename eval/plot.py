"""Figures as files: matplotlib without a screen, panels of curves with bands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.core.durable import replacing

from .table import Result, Summary

DPI = 120
PANEL = (4.0, 3.2)
"""Inches of one panel of curves."""
MARKERS = "osD^vP"
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """A metric of a group over training.

    Args:
        item: of the metric.
        label: for a legend; "" for none.
        color, style: of the line; by default the group's.
        difference: draw its difference to the control, with its interval.
        interval: the band is the mean's interval, not one standard error.
    """

    group: str
    metric: str
    item: str = ""
    label: str = ""
    color: str = ""
    style: str = ""
    difference: bool = False
    interval: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over steps on one pair of axes."""

    title: str
    ylabel: str
    curves: Sequence[Curve]
    log: bool = False
    levels: Sequence[float] = ()
    legend: bool = True


@dataclass(frozen=True)
class Forest:
    """Mean differences of a metric to the control with their intervals, a line for each group.

    Args:
        missing: group -> word in place of a difference.
    """

    title: str
    xlabel: str
    metric: str
    missing: Mapping[str, str]


def panels(
    result: Result, path: Path, rows: Sequence[Sequence[Panel | Forest]], **options: Any
) -> None:
    """Draw rows of panels, each as long as the longest; ``options`` are those of `canvas`."""
    styles = looks(result.groups, options.pop("control", ""))
    with canvas(path, len(rows), max(map(len, rows)), **options) as (_, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for line_of_axes, row in zip(axes, rows, strict=True):
            for axis, panel in zip(line_of_axes, row, strict=False):
                axis.set_axis_on()
                if isinstance(panel, Forest):
                    _draw_forest(axis, result, panel, styles)
                    continue
                for curve in panel.curves:
                    _draw(axis, result, curve, panel.log, styles[curve.group])
                for level in panel.levels:
                    axis.axhline(level, color="black", lw=0.7, ls=":")
                axis.set_yscale("log" if panel.log else "linear")
                finish(axis, panel.title, panel.ylabel, panel.legend)


def _draw(axis: Any, result: Result, curve: Curve, log: bool, look: Mapping[str, Any]) -> None:
    color = curve.color or look["color"]
    if not curve.difference:
        points = result.curve(curve.group, curve.metric, curve.item)
        style = {"ls": curve.style or look["ls"], "marker": "." if len(points) < 12 else ""}
        points = positive(points) if log else points
        line(axis, points, color, curve.label or None, interval=curve.interval, **style)
        return
    points = result.over_training(curve.group, curve.metric, curve.item)
    points = [point for point in points if point.difference is not None]
    axis.plot([p.step for p in points], [p.difference for p in points], color=color, marker=".")
    for point in points:
        if point.difference_interval is not None:
            axis.plot([point.step] * 2, point.difference_interval, color=color, lw=1)


def _draw_forest(axis: Any, result: Result, panel: Forest, styles: Mapping[str, Any]) -> None:
    metric = result.metric(panel.metric)
    axis.axvline(0, color="black", lw=0.8)
    for row, group in enumerate(result.groups):
        line, color = result.summary(group, panel.metric), styles[group]["color"]
        if line is None or line.difference is None:
            # beside the zero line and not on it: there is no difference
            place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
            word = panel.missing.get(group, "n/a")
            axis.annotate(word, (0, row), va="center", fontsize=8, color="gray", **place)
            continue
        ends = [metric.scale * end for end in line.difference_interval or ()]
        axis.plot(ends, [row] * len(ends), color=color, lw=2)
        axis.plot(metric.scale * line.difference, row, marker=styles[group]["marker"], color=color)
    axis.set_yticks(range(len(result.groups)), result.groups, fontsize=8)
    for tick, group in zip(axis.get_yticklabels(), result.groups, strict=True):
        tick.set_color(styles[group]["color"])
    axis.set_ylim(len(result.groups) - 0.4, -0.6)
    finish(axis, panel.title, legend=False, xlabel=panel.xlabel)


def positive(curve: Sequence[Summary]) -> list[Summary]:
    """A curve for a logarithmic axis: zeros become gaps, bands end above zero."""
    return [
        replace(point, error=min(point.error, 0.99 * point.mean))
        if point.mean and point.error is not None
        else replace(point, mean=None, error=None)
        for point in curve
    ]


@contextmanager
def canvas(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """A figure and its axes, (rows, columns) also for one; the picture is written at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (PANEL[0] * columns, PANEL[1] * rows)
    options = {"layout": "constrained", "figsize": size, **options}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
    try:
        yield figure, axes
        with replacing(path) as aside:
            figure.savefig(aside, dpi=DPI)
    finally:
        plt.close(figure)


def looks(groups: Sequence[str], control: str = "") -> dict[str, dict[str, Any]]:
    """Color, marker and line of each group; the control is black, and no two look alike."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"]
    styles: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(group for group in groups if group != control):
        turn = number // 10
        styles[group] = {
            "color": colors(number % 10),
            "marker": MARKERS[turn % len(MARKERS)],
            "ls": STYLES[turn % len(STYLES)],
        }
    if control:
        styles[control] = {"color": "black", "marker": ".", "ls": "-"}
    return styles


def line(
    axis: Any, curve: Sequence[Summary], color: Any, label: str | None = None, **style: Any
) -> None:
    """A curve with a band of one standard error, or the ``interval``; undefined points are gaps."""
    interval = style.pop("interval", False)
    steps = [point.step for point in curve]
    means = [math.nan if point.mean is None else point.mean for point in curve]
    errors = [math.nan if point.error is None else point.error for point in curve]
    axis.plot(steps, means, color=color, label=label, **{"lw": 1.4, **style})
    bands = [(m - e, m + e) for m, e in zip(means, errors, strict=True)]
    if interval:
        bands = [point.interval or (math.nan, math.nan) for point in curve]
    if any(low < high for low, high in bands):
        low, high = zip(*bands, strict=True)
        axis.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)


def finish(
    axis: Any, title: str, ylabel: str = "", legend: bool = True, xlabel: str = "optimizer step"
) -> None:
    """Title, grid and labels of a panel, by default over steps."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.yaxis.get_offset_text().set_fontsize(7)
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=xlabel == "optimizer step")
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def wrapped(text: str, most: int = 44) -> str:
    """A long dotted name on two lines."""
    if len(text) <= most:
        return text
    dots = [i for i, letter in enumerate(text) if letter in ". "]
    middle = min(dots, key=lambda i: abs(i - len(text) / 2), default=len(text) // 2)
    return f"{text[: middle + 1].rstrip()}\n{text[middle + 1 :]}"
