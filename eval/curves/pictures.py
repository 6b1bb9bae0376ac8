"""Panels of lines with bands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import figures
from .bands import Curve

PANEL = (4.0, 3.2)
"""Inches of one panel."""


@contextmanager
def canvas(path: Path, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    """The axes of a grid of panels; see ``figures.canvas``."""
    size = (PANEL[0] * columns, PANEL[1] * rows)
    with figures.canvas(path, rows, columns, figsize=size, **options) as (_, axes):
        yield axes


def line(axis: Any, curve: Curve, color: Any, label: str | None = None, **style: Any) -> None:
    """A curve with a band of one standard error; undefined points are gaps."""
    means = [math.nan if value is None else value for value in curve.mean]
    errors = [math.nan if value is None else value for value in curve.error]
    axis.plot(curve.steps, means, color=color, label=label, **{"lw": 1.4, **style})
    if any(error > 0 for error in errors):
        axis.fill_between(
            curve.steps,
            [m - e for m, e in zip(means, errors, strict=True)],
            [m + e for m, e in zip(means, errors, strict=True)],
            color=color,
            alpha=0.15,
            lw=0,
        )


def finish(axis: Any, title: str, ylabel: str = "", legend: bool = True) -> None:
    """Title, grid and labels of a panel over steps."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.yaxis.get_offset_text().set_fontsize(7)
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)
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
