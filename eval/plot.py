"""Figures as files: matplotlib without a screen, panels of curves with bands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilora_diffusion.durable import replacing

from .table import Summary

DPI = 120
PANEL = (4.0, 3.2)
"""Inches of one panel of curves."""
MARKERS = "osD^vP"
STYLES = ("-", "--", ":", "-.")


@contextmanager
def canvas(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """A figure and its axes, (rows, columns) also for one; the picture is written at the end.

    Args:
        options: of ``subplots``, such as ``figsize``; by default a panel is ``PANEL`` large.
    """
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
    """A curve with a band of one standard error; undefined points are gaps.

    Args:
        style: of the line; ``alpha`` is the band's.
    """
    alpha = style.pop("alpha", 0.15)
    steps = [point.step for point in curve]
    means = [math.nan if point.mean is None else point.mean for point in curve]
    errors = [math.nan if point.error is None else point.error for point in curve]
    axis.plot(steps, means, color=color, label=label, **{"lw": 1.4, **style})
    if any(error > 0 for error in errors):
        low = [m - e for m, e in zip(means, errors, strict=True)]
        high = [m + e for m, e in zip(means, errors, strict=True)]
        axis.fill_between(steps, low, high, color=color, alpha=alpha, lw=0)


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


def legend_below(axes: Sequence[Any], ncols: int) -> None:
    """One legend under the whole figure, for what these axes have labels for."""
    shown: dict[str, Any] = {}
    for axis in axes:
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axes[0].figure.legend(
        shown.values(),
        shown,
        loc="outside lower center",
        ncols=ncols,
        fontsize=8,
        frameon=False,
    )
