"""The training curves: which there are, and what a plot of them is drawn from. No widgets here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .training_data import Points, Progress, radius, series, smooth, thin

COLORS = {
    "teal": "#0d9488",
    "orange": "#f97316",
    "indigo": "#6366f1",
    "pink": "#db2777",
    "green": "#65a30d",
    "blue": "#0ea5e9",
    "brown": "#a16207",
    "purple": "#9333ea",
}
"""Of runs; readable on white and on near black."""
FAINT, RADIUS = ", faint", ", ρ"
"""Ends of the names of a run's two other lines: what lies behind its curve, and rho."""
PALETTE = {
    **{name + FAINT: f"{color}77" for name, color in COLORS.items()},
    **COLORS,
    **{name + RADIUS: "#94a3b899" for name in COLORS},
}
"""Line -> colour; what comes later is drawn over what comes before."""
Curves = dict[str, tuple[str, Points]]
"""What a tooltip says of a curve -> its line in the palette, and its points."""


@dataclass(frozen=True)
class Shown:
    """A chosen run as it is now; ``color`` is a name in :data:`COLORS`."""

    name: str
    color: str
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    state: Progress


@dataclass(frozen=True)
class Failed:
    """A chosen run that can't be read, and why."""

    name: str
    color: str
    reason: str


@dataclass(frozen=True)
class Chart:
    """A plot.

    Args:
        name: of its element in the page.
        symbol: of the vertical axis.
        caption: what its lines are.
        curves: from the runs and the window of the running mean.
    """

    name: str
    title: str
    symbol: str
    caption: str
    curves: Callable[[Sequence[Shown], int], Curves]


def loss_curves(runs: Sequence[Shown], window: int) -> Curves:
    """Training loss: each step's faint, the running mean over it."""
    curves: Curves = {}
    for run in runs:
        raw = series(run.rows, "loss")
        curves[f"{run.name}, each step"] = (run.color + FAINT, raw)
        curves[run.name] = (run.color, smooth(raw, window))
    return curves


def heldout_curves(runs: Sequence[Shown], window: int) -> Curves:
    """Held-out loss, and faint the loss on the training set on the same grid."""
    return _over(runs, "train_grid_loss", "training set", "heldout_loss")


def norm_curves(runs: Sequence[Shown], window: int) -> Curves:
    """The auxiliary's norm after projection, faint before it, and rho."""
    norms = _over(runs, "auxiliary_norm_before", "before projection", "auxiliary_norm")
    return norms | radius_curves(runs)


def _over(runs: Sequence[Shown], behind: str, what: str, key: str) -> Curves:
    """One key of the log over another, which is faint and called ``what``."""
    curves: Curves = {}
    for run in runs:
        curves[f"{run.name}, {what}"] = (run.color + FAINT, series(run.rows, behind))
        curves[run.name] = (run.color, series(run.rows, key))
    return curves


def radius_curves(runs: Sequence[Shown]) -> Curves:
    """rho: one line for all runs with the same constant one, one a run where it is scheduled."""
    curves: Curves = {}
    for run in runs:
        line = radius(run.record, run.state.steps)
        if not line:
            continue
        constant = run.record["config"].get("rho_schedule", "constant") == "constant"
        name = f"ρ = {line[0][1]:g}" if constant else f"ρ of {run.name}"
        known = curves.get(name)
        if known is None or known[1][-1][0] < line[-1][0]:  # as long as the longest run
            curves[name] = (run.color + RADIUS, line)
    return curves


def rate_curves(runs: Sequence[Shown], window: int) -> Curves:
    """The primary's learning rate."""
    return {run.name: (run.color, series(run.rows, "lr")) for run in runs}


CHARTS = (
    Chart("loss", "Training loss", "loss", "Faint: each step. Line: running mean.", loss_curves),
    Chart("heldout", "Held-out loss", "loss", "Faint: on the training set.", heldout_curves),
    Chart(
        *("norm", "Norm of the auxiliary", "‖B₂A₂‖"),
        "Faint: before the projection. Line: after it. Grey: the radius ρ.",
        norm_curves,
    ),
    Chart("rate", "Learning rate", "lr", "Of the primary adapter.", rate_curves),
)


def frame(curves: Curves) -> pd.DataFrame | None:
    """Curves as a table of step, value, line and run; None where there is nothing to draw.

    Every line of the palette has an empty row first. So a plot knows all of them from the start:
    Gradio 6.31 may show old data, or other colours, when lines or colours change later.
    """
    drawn = {name: (line, thin(points)) for name, (line, points) in curves.items() if points}
    rows = [
        (step, value, line, name)
        for name, (line, points) in drawn.items()
        for step, value in points
    ]
    if not rows:
        return None
    order = {line: place for place, line in enumerate(PALETTE)}
    rows.sort(key=lambda row: order[row[2]])
    empty = [(None, None, line, "") for line in PALETTE]
    return pd.DataFrame([*empty, *rows], columns=["step", "value", "line", "run"])


def colors_of(chosen: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The name of a colour for each of up to eight chosen runs, all different.

    A run keeps its colour whatever else is chosen, except where two would have the same one.

    Args:
        known: all runs there are.
    """
    free, found = list(COLORS), {}
    for path in chosen[: len(COLORS)]:
        own = list(COLORS)[known.index(path) % len(COLORS)] if path in known else free[0]
        found[path] = own if own in free else free[0]
        free.remove(found[path])
    return found
