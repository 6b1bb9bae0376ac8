"""Curves of the chosen runs, as tables for Gradio's plots, without widgets.

    for name, lines in charts(runs, window=25).items():
        TITLES[name], table(lines)

A run has the same color in all plots except those of `WITH_LEGEND`, in which each concept has a
color, and runs differ in their dashes. Lines in the background (such as the loss of each step) are
faint, and lines that belong to no run are gray.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from bilora_diffusion.core.values import (
    BY_LEVEL,
    HELDOUT_DISTANCE,
    HELDOUT_LOSS,
    TRAINING_GRID_LOSS,
)
from bilora_diffusion.run.record import BY_CONCEPT
from bilora_diffusion.text.metrics import METRICS

from .points import Points, Row, series, smooth, thin
from .runs import CONTROL, Progress, RunItem, find_control

# Colors of runs; each has a contrast ratio of at least 3 with a light page and with a dark page.
COLORS = ("#0d9488", "#ea580c", "#6366f1", "#db2777", "#4d9a0c", "#0284c7", "#b7791f", "#a855f7")
# Color of lines that belong to no run
GREY = "#808890"
# Colors of concepts, with the same minimum contrast
CONCEPT_COLORS = (
    "#3b82f6",
    "#ef4444",
    "#16a34a",
    "#8b5cf6",
    "#d97706",
    "#8d6e63",
    "#c0568f",
    "#0891b2",
)
# The last two digits of a color are its opacity. ``style.css`` uses them to select kinds of lines,
# because Gradio's plots have no other property for single lines.
# Opacity of lines in the background, which are thin and faint
FAINT = "80"
# Opacity of the control's line, which is wide, because other lines often cover it
WIDE = "c0"
# Opacities of the first run, the second run, ...: solid, dashed, dotted, dashed and dotted
DASHES = ("", "fe", "fd", "fc")
# Opacity of the radius: short dashes with wide gaps, so that an equal norm stays visible below it
RADIUS = "f7"
# Plots in which each concept has a color, and runs do not
WITH_LEGEND = ("concepts",)
# Plots whose vertical axis starts at 0. The norm often equals the radius at all steps; otherwise,
# it would be a line at the edge of the plot.
FROM_ZERO = ("norm",)
# Pattern of the held-out loss at one noise level, in the log
LEVEL_KEY = re.compile(rf"{re.escape(BY_LEVEL)}(\d{{1,9}})")


@dataclass(frozen=True)
class TrainingRun:
    """The current state of a chosen run."""

    run: RunItem
    # Index of its color in `COLORS`
    color: int
    # Rows of its log
    rows: list[dict[str, Any]]
    # Progress, or the reason why the run is unreadable
    state: Progress
    # False if its record or log could not be read
    is_readable: bool = True

    def line(self, points: Points) -> Line:
        """Make a line in the color of this run."""
        is_control = self.run.method == CONTROL and self.run.guided_target <= 1
        opacity = WIDE if is_control else ""
        return Line(self.run.name, points, COLORS[self.color] + opacity)


@dataclass(frozen=True)
class Line:
    """A curve of a plot."""

    # Name in the tooltip
    name: str
    points: Points
    # Color with the opacity of its kind of line
    color: str = GREY
    # Name of the concept, in plots of `WITH_LEGEND` only
    concept: str = ""
    # Name of the run, in plots of `WITH_LEGEND` only
    run: str = ""


def table(lines: Sequence[Line]) -> pd.DataFrame:
    """Return a table of all points with columns "step", "value" and "run" (the line's name).

    Values have five significant digits.
    """
    rows = []
    for line in lines:
        for step, value in thin(line.points):
            rows.append((step, float(f"{value:.5g}"), line.name))
    return pd.DataFrame(rows, columns=["step", "value", "run"])


def ceiling(values: Sequence[float]) -> float | None:
    """Return an upper end of the vertical axis that cuts off rare peaks; None if there are none."""
    low, usual_high, high = np.quantile(values, [0, 0.99, 1])
    usual_range = usual_high - low
    # One value in a hundred is above `usual_high`. Of 50 or fewer values, a single one is more than
    # that, so no peak counts as rare.
    has_peaks = len(values) > 50 and high - low > 3 * usual_range > 0
    if not has_peaks:
        return None
    return float(usual_high + 0.06 * usual_range)


def curves(
    runs: Sequence[TrainingRun],
    key: str,
    window: int = 1,
    background: tuple[str, str] | None = None,
) -> list[Line]:
    """Return a line with the running mean of a metric for each run.

    Args:
        runs: runs; those without the metric get empty lines.
        key: name of the metric.
        window: window of the running mean, in logged values.
        background: name and title of a metric that is drawn in the background as faint lines.
    """
    lines = []
    if background is not None:
        background_key, title = background
        for run in runs:
            points = series(run.rows, background_key)
            lines.append(Line(f"{run.run.name}, {title}", points, COLORS[run.color] + FAINT))
    for run in runs:
        lines.append(run.line(smooth(series(run.rows, key), window)))
    return lines


def differences(
    runs: Sequence[TrainingRun], key: str, window: int = 1, in_percent: bool = False
) -> list[Line]:
    """Return each run's difference from the LoRA run with the same seed and data, as lines.

    The two runs get the same samples and the same noise in each step. Runs without such a LoRA run
    have no line.

    Args:
        runs: runs, including the LoRA runs.
        key: name of the metric.
        window: window of the running mean, in logged values.
        in_percent: whether the difference is in percent of LoRA's value.
    """
    items = [run.run for run in runs]
    lines = []
    for run in runs:
        control = find_control(run.run, items)
        if control is None:
            continue
        control_values = dict(series(runs[items.index(control)].rows, key))
        points = []
        for step, value in series(run.rows, key):
            control_value = control_values.get(step)
            if control_value is None or (in_percent and control_value == 0):
                continue
            unit = control_value / 100 if in_percent else 1.0
            points.append((step, (value - control_value) / unit))
        lines.append(run.line(smooth(points, window)))
    return add_zero_line(lines, "LoRA with the same seed")


def add_zero_line(lines: list[Line], name: str) -> list[Line]:
    """Add a line at 0 in the background that is as long as the other lines."""
    steps = []
    for line in lines:
        steps += [step for step, _ in line.points]
    zero_points: Points = []
    if steps:
        zero_points = [(min(steps), 0.0), (max(steps), 0.0)]
    return [Line(name, zero_points), *lines]


def changes_by_level(rows: Sequence[Row]) -> Points:
    """Return the change of the held-out loss from the first to the last measurement.

    Points are (timestep of the noise level, change).
    """
    measured_rows = [row for row in rows if HELDOUT_LOSS in row]
    if not measured_rows:
        return []
    first = measured_rows[0]
    last = measured_rows[-1]
    points = []
    for key, value in last.items():
        match = LEVEL_KEY.fullmatch(key)
        first_value = first.get(key)
        if match and value is not None and first_value is not None:
            points.append((int(match[1]), value - first_value))
    return points


def concept_curves(runs: Sequence[TrainingRun]) -> list[Line]:
    """Return a line with the held-out loss for each run and concept."""
    lines = []
    for run in runs:
        keys: dict[str, None] = {}  # an ordered set
        for row in run.rows:
            keys |= dict.fromkeys(row)
        for key in keys:
            points = series(run.rows, key)
            if key.startswith(BY_CONCEPT) and points:
                concept = key.removeprefix(BY_CONCEPT)
                name = f"{run.run.name}, {concept}"
                lines.append(Line(name, points, concept=concept, run=run.run.name))
    return add_colors(lines)


def add_colors(lines: Sequence[Line]) -> list[Line]:
    """Give each line the color of its concept and the dashes of its run."""
    concepts = list(dict.fromkeys(line.concept for line in lines))
    runs = list(dict.fromkeys(line.run for line in lines))
    colored_lines = []
    for line in lines:
        color = CONCEPT_COLORS[concepts.index(line.concept) % len(CONCEPT_COLORS)]
        color += DASHES[runs.index(line.run) % len(DASHES)]
        colored_lines.append(replace(line, color=color))
    return colored_lines


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Return the names and colors for a legend: each concept, and each run if there are several."""
    entries = list({line.concept: line.color[: len(GREY)] for line in lines}.items())
    runs = list(dict.fromkeys(line.run for line in lines))
    if len(runs) > 1:
        for number, run in enumerate(runs):
            entries.append((run, GREY + DASHES[number % len(DASHES)]))
    return entries


def radius_lines(runs: Sequence[TrainingRun]) -> list[Line]:
    """Return a line for each value of the radius rho in the Bi-LoRA runs."""
    points_by_name: dict[str, Points] = {}
    for run in runs:
        rho = run.run.record["config"].get("rho")
        # A run without steps has no line.
        points = []
        if run.run.method == "bilora" and isinstance(rho, int | float):
            points = [(step, float(rho)) for step in sorted({1, run.state.steps} - {0})]
        if not points:
            continue
        name = f"ρ = {rho:g}"
        # A line shared by several runs is as long as the longest run.
        if name not in points_by_name or points_by_name[name][-1][0] < points[-1][0]:
            points_by_name[name] = points
    return [Line(name, points, GREY + RADIUS) for name, points in points_by_name.items()]


def charts(runs: Sequence[TrainingRun], window: int) -> dict[str, list[Line]]:
    """Return the lines of each plot, by the names in `TITLES`; background lines come first.

    Args:
        runs: readable runs.
        window: window of the running mean of the training loss, in steps.
    """
    levels = [run.line(changes_by_level(run.rows)) for run in runs]
    plots = {
        "loss": curves(runs, "loss", window, background=("loss", "each step")),
        "heldout": curves(runs, HELDOUT_LOSS, background=(TRAINING_GRID_LOSS, "training set")),
        "distance": curves(runs, HELDOUT_DISTANCE),
        "loss-difference": differences(runs, "loss", window),
        "heldout-difference": differences(runs, HELDOUT_LOSS, in_percent=True),
        "concepts": concept_curves(runs),
        "levels": add_zero_line(levels, "base model"),
    }
    for name in METRICS:
        plots[name] = curves(runs, name)
    # The last lines are drawn on top.
    plots["norm"] = curves(runs, "auxiliary_norm", background=UNPROJECTED) + radius_lines(runs)
    plots["rate"] = []
    if any(len(learning_rates(run)) > 1 for run in runs):
        plots["rate"] = curves(runs, "lr")
    return plots


def learning_rates(run: TrainingRun) -> set[float]:
    """Return the distinct learning rates of a run: one if constant, none before the first step."""
    return {rate for _, rate in series(run.rows, "lr")}


UNPROJECTED = ("auxiliary_norm_before", "before the projection")
BELOW_ZERO = (
    "Below zero: lower than LoRA with the same seed. A lower loss does not imply better samples."
)
# Plot -> title and caption
TITLES = {
    "loss": ("Training loss", "Running mean; faint lines: each step."),
    "heldout": ("Held-out loss", "Faint lines: loss on the training set."),
    "distance": (
        "Distance of samples from held-out images",
        "Lower is better. Measured with --choose_by samples.",
    ),
    "loss-difference": (
        "Training loss, difference from LoRA",
        "Below zero: the run fits the training data better than LoRA, but not necessarily other"
        " data.",
    ),
    "heldout-difference": ("Held-out loss, difference from LoRA in %", BELOW_ZERO),
    "concepts": (
        "Held-out loss of each concept",
        "In this plot, each concept has a color.",
    ),
    "levels": (
        "Held-out loss at each noise level",
        "Last measurement minus the first one (base model); horizontal axis: timestep.",
    ),
    **{name: (name.replace("_", " "), "On held-out rows.") for name in METRICS},
    "norm": (
        "Norm of the auxiliary, ‖B₂A₂‖",
        "After the projection; faint lines: before it; dashed: the radius ρ.",
    ),
    "rate": ("Learning rate", "Of the primary adapter."),
}
