"""Figures of results: panels that show curves with bands, or differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.core.plotting import new_figure

from .table import Result, Summary

# Width and height of one panel, in inches
PANEL_INCHES = (4.0, 3.2)
MARKERS = "osD^vP"
LINE_STYLES = ("-", "--", ":", "-.")
# Number of colors in matplotlib's color map tab10
COLORS = 10
# Curves with fewer points have markers
FEW_POINTS = 12
# Maximum number of characters of a one-line title above a panel
TITLE_LETTERS = 44


@dataclass(frozen=True)
class Curve:
    """A curve of a panel: a group's metric over training."""

    group: str
    metric: str
    item: str = ""
    # Label in the legend; "" for none
    label: str = ""
    # Color and style of the line; "" for the group's color and style
    color: str = ""
    style: str = ""
    # Draw the difference from the control, with its interval
    difference: bool = False
    # Draw the interval of the mean as the band instead of one standard error
    interval: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over steps on one pair of axes, and horizontal lines."""

    title: str
    ylabel: str
    curves: Sequence[Curve]
    log: bool = False
    lines: Sequence[float] = ()
    legend: bool = True


@dataclass(frozen=True)
class Forest:
    """Mean differences of a metric from the control with intervals, one line for each group."""

    title: str
    xlabel: str
    metric: str
    # Group -> text that is shown instead of a missing difference
    missing: Mapping[str, str]


def panels(
    result: Result, path: Path, rows: Sequence[Sequence[Panel | Forest]], **options: Any
) -> None:
    """Draw rows of panels.

    Args:
        result: result that the panels show.
        path: file of the picture.
        rows: rows of panels, from top to bottom.
        options: options of `canvas`, and ``control``, the group that is drawn in black.
    """
    styles = group_styles(result.groups, options.pop("control", ""))
    with canvas(path, len(rows), max(map(len, rows)), **options) as (_, axes):
        # All axes are off at first, since a row may have fewer panels than the longest one.
        for axis in axes.flat:
            axis.set_axis_off()
        for row_of_axes, row in zip(axes, rows, strict=True):
            for axis, panel in zip(row_of_axes, row, strict=False):
                axis.set_axis_on()
                if isinstance(panel, Forest):
                    _draw_forest(axis, result, panel, styles)
                else:
                    _draw_panel(axis, result, panel, styles)


def _draw_panel(axis: Any, result: Result, panel: Panel, styles: Mapping[str, Any]) -> None:
    for curve in panel.curves:
        style = styles[curve.group]
        if curve.difference:
            _draw_difference(axis, result, curve, curve.color or style["color"])
            continue
        points = result.curve(curve.group, curve.metric, curve.item)
        marker = "." if len(points) < FEW_POINTS else ""
        if panel.log:
            points = positive(points)
        draw_curve(
            axis,
            points,
            curve.color or style["color"],
            curve.label or None,
            interval=curve.interval,
            ls=curve.style or style["ls"],
            marker=marker,
        )
    for value in panel.lines:
        axis.axhline(value, color="black", lw=0.7, ls=":")
    axis.set_yscale("log" if panel.log else "linear")
    finish(axis, panel.title, panel.ylabel, panel.legend)


def _draw_difference(axis: Any, result: Result, curve: Curve, color: Any) -> None:
    """Draw the difference from the control over training, with a bar for each interval."""
    points = []
    for point in result.over_training(curve.group, curve.metric, curve.item):
        if point.difference is not None:
            points.append(point)
    steps = [point.step for point in points]
    axis.plot(steps, [point.difference for point in points], color=color, marker=".")
    for point in points:
        if point.difference_interval is not None:
            axis.plot([point.step] * 2, point.difference_interval, color=color, lw=1)


def _draw_forest(axis: Any, result: Result, panel: Forest, styles: Mapping[str, Any]) -> None:
    metric = result.metric(panel.metric)
    axis.axvline(0, color="black", lw=0.8)
    for row, group in enumerate(result.groups):
        color = styles[group]["color"]
        marker = styles[group]["marker"]
        summary = result.summary(group, panel.metric)
        if summary is None or summary.difference is None:
            # Five points to the right: a word on the zero line would look like a difference of 0.
            offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
            word = panel.missing.get(group, "n/a")
            axis.annotate(word, (0, row), va="center", fontsize=8, color="gray", **offset)
            continue
        if summary.difference_interval is not None:
            low, high = summary.difference_interval
            axis.plot([metric.scale * low, metric.scale * high], [row, row], color=color, lw=2)
        axis.plot(metric.scale * summary.difference, row, marker=marker, color=color)
    axis.set_yticks(range(len(result.groups)), result.groups, fontsize=8)
    for tick, group in zip(axis.get_yticklabels(), result.groups, strict=True):
        tick.set_color(styles[group]["color"])
    axis.set_ylim(len(result.groups) - 0.4, -0.6)  # the first group on top
    finish(axis, panel.title, legend=False, xlabel=panel.xlabel)


def positive(curve: Sequence[Summary]) -> list[Summary]:
    """Return a curve for a logarithmic axis: means of 0 become gaps, and bands stay above 0."""
    points = []
    for point in curve:
        if point.mean and point.error is not None:
            # The lower edge of the band, mean - error, stays at 1 % of the mean or above.
            points.append(replace(point, error=min(point.error, 0.99 * point.mean)))
        else:
            points.append(replace(point, mean=None, error=None))
    return points


@contextmanager
def canvas(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Create a figure, and write the picture on exit.

    Args:
        path: file of the picture.
        rows, columns: numbers of rows and of columns of axes.
        options: options of the figure (``figsize``, ``layout``) and of its `subplots`.

    Yields:
        The figure and an array of axes with the shape (rows, columns).
    """
    width, height = PANEL_INCHES
    size = options.pop("figsize", (width * columns, height * rows))
    layout = options.pop("layout", "constrained")
    with new_figure(path, figsize=size, layout=layout) as figure:
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def group_styles(groups: Sequence[str], control: str = "") -> dict[str, dict[str, Any]]:
    """Return a different combination of color, marker and line for each group, by label.

    The control, if it is given, is black.
    """
    import matplotlib

    colors = matplotlib.colormaps["tab10"]
    styles: dict[str, dict[str, Any]] = {}
    colored_groups = [group for group in groups if group != control]
    for number, group in enumerate(colored_groups):
        turn = number // COLORS  # how many times all colors have been used
        styles[group] = {
            "color": colors(number % COLORS),
            "marker": MARKERS[turn % len(MARKERS)],
            "ls": LINE_STYLES[turn % len(LINE_STYLES)],
        }
    if control:
        styles[control] = {"color": "black", "marker": ".", "ls": "-"}
    return styles


def draw_curve(
    axis: Any,
    curve: Sequence[Summary],
    color: Any,
    label: str | None = None,
    interval: bool = False,
    **style: Any,
) -> None:
    """Draw a curve with a band of one standard error or, with ``interval``, of the interval.

    Undefined points become gaps.
    """
    steps = [point.step for point in curve]
    means, lows, highs = [], [], []
    for point in curve:
        # matplotlib leaves a gap at NaN.
        mean = math.nan if point.mean is None else point.mean
        error = math.nan if point.error is None else point.error
        low, high = mean - error, mean + error
        if interval:
            low, high = point.interval or (math.nan, math.nan)
        means.append(mean)
        lows.append(low)
        highs.append(high)
    draw_band(axis, steps, means, lows, highs, color, label, **style)


def draw_band(
    axis: Any,
    positions: Sequence[Any],
    means: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    color: Any,
    label: str | None = None,
    **style: Any,
) -> None:
    """Draw a line and, if the band has a width anywhere, the band around it."""
    axis.plot(positions, means, color=color, label=label, **{"lw": 1.4, **style})
    if any(low < high for low, high in zip(lows, highs, strict=True)):
        axis.fill_between(positions, lows, highs, color=color, alpha=0.15, lw=0)


def finish(
    axis: Any, title: str, ylabel: str = "", legend: bool = True, xlabel: str = "optimizer step"
) -> None:
    """Set the title, axis labels, grid and legend of a panel."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.yaxis.get_offset_text().set_fontsize(7)
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=xlabel == "optimizer step")
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def wrap_name(text: str) -> str:
    """Return the name; split a long one into two lines, at the dot or space nearest the middle."""
    if len(text) <= TITLE_LETTERS:
        return text
    breaks = [index for index, letter in enumerate(text) if letter in ". "]
    middle = min(breaks, key=lambda index: abs(index - len(text) / 2), default=len(text) // 2)
    return f"{text[: middle + 1].rstrip()}\n{text[middle + 1 :]}"
