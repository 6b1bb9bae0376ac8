"""State of the chosen runs and their curves, as tables for Gradio's plots. No widgets.

    for name, lines in charts(runs, window=25).items():
        TITLES[name], table(lines)

A run has one color in all plots. Lines in the background (each step's loss, the training set) are
faint, and lines of no run are grey. In the plots of `WITH_LEGEND` concepts have colors, and runs
differ by their dashes.
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

# Colors of runs; each has a contrast of at least 3 to a light and to a dark page.
COLORS = ("#0d9488", "#ea580c", "#6366f1", "#db2777", "#4d9a0c", "#0284c7", "#b7791f", "#a855f7")
# Color of lines that belong to no run.
GREY = "#808890"
# Colors of concepts, of the same contrast.
LABEL_COLORS = (
    "#3b82f6",
    "#ef4444",
    "#16a34a",
    "#8b5cf6",
    "#d97706",
    "#8d6e63",
    "#c0568f",
    "#0891b2",
)
# The last two digits of a color are its opacity. By them ``style.css`` knows the kind of a line:
# a faint line is thin;
FAINT = "80"
# the control's line is broad, since others often lie on it;
WIDE = "c0"
# by the run's number a line is solid, dashed, dotted, or dashed and dotted;
DASHES = ("", "fe", "fd", "fc")
# the radius has short dashes with wide gaps, in which the equal norm below it is seen.
RADIUS = "f7"
# Plots whose colors are those of concepts, not of runs
WITH_LEGEND = ("concepts",)
# Column of the held-out loss at one noise level.
LEVEL_KEY = re.compile(rf"{re.escape(BY_LEVEL)}(\d{{1,9}})")


@dataclass(frozen=True)
class TrainingRun:
    """A chosen run as it is now."""

    run: RunItem
    # Number among `COLORS`
    color: int
    rows: list[dict[str, Any]]
    # Its progress; the reason of a run that can't be read
    state: Progress
    # True if record and log could be read
    is_readable: bool = True

    def line(self, points: Points) -> Line:
        """A line of this run."""
        opacity = WIDE if self.run.method == CONTROL else ""
        return Line(self.run.name, points, COLORS[self.color] + opacity)


@dataclass(frozen=True)
class Line:
    """A curve."""

    # Name that is shown where the pointer is on it
    name: str
    points: Points
    # Color, with the opacity that gives its kind
    color: str = GREY
    # Name of the color in a legend
    label: str = ""
    # Name of the dashes in a legend
    run: str = ""


def table(lines: Sequence[Line]) -> pd.DataFrame:
    """Points of lines as rows with "step", "value" (of five digits) and "run" (the line's name)."""
    rows = []
    for line in lines:
        for step, value in thin(line.points):
            rows.append((step, float(f"{value:.5g}"), line.name))
    return pd.DataFrame(rows, columns=["step", "value", "run"])


def ceiling(values: Sequence[float]) -> float | None:
    """End of the vertical axis that cuts off rare peaks; None if there are none."""
    low, usual_high, high = np.quantile(values, [0, 0.99, 1])
    usual_range = usual_high - low
    # One of a hundred values is above `usual_high`; of fewer than 50 any may be.
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
    """The running mean of a metric, for each run.

    Args:
        runs: runs with the metric in their logs.
        key: name of the metric.
        window: steps of the mean.
        background: name of a metric whose faint lines lie behind, and its title in the plot.
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
    """Each run minus plain LoRA of the same seed on the same data, step by step.

    Such runs see the same samples with the same noise in each step.

    Args:
        runs: runs, LoRA's among them.
        key: name of the metric.
        window: steps of the running mean.
        in_percent: the difference is in percent of LoRA's value.
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
    return over_zero(lines, "LoRA of the same seed")


def over_zero(lines: list[Line], name: str) -> list[Line]:
    """The lines, and behind them one at 0, of their length."""
    steps = []
    for line in lines:
        steps += [step for step, _ in line.points]
    zero_points: Points = []
    if steps:
        zero_points = [(min(steps), 0.0), (max(steps), 0.0)]
    return [Line(name, zero_points), *lines]


def by_level(rows: Sequence[Row]) -> Points:
    """Held-out loss at each noise level: the last measurement minus the first."""
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


def by_concept(runs: Sequence[TrainingRun]) -> list[Line]:
    """The held-out loss of each concept, for each run."""
    lines = []
    for run in runs:
        keys: dict[str, None] = {}  # in the order in which they come
        for row in run.rows:
            keys |= dict.fromkeys(row)
        for key in keys:
            points = series(run.rows, key)
            if key.startswith(BY_CONCEPT) and points:
                concept = key.removeprefix(BY_CONCEPT)
                name = f"{run.run.name}, {concept}"
                lines.append(Line(name, points, label=concept, run=run.run.name))
    return colored(lines)


def colored(lines: Sequence[Line]) -> list[Line]:
    """Give each line the color of its label and the dashes of its run."""
    labels = list(dict.fromkeys(line.label for line in lines))
    runs = list(dict.fromkeys(line.run for line in lines))
    colored_lines = []
    for line in lines:
        color = LABEL_COLORS[labels.index(line.label) % len(LABEL_COLORS)]
        color += DASHES[runs.index(line.run) % len(DASHES)]
        colored_lines.append(replace(line, color=color))
    return colored_lines


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Names and colors of a legend: of each label, and of each run if there are several."""
    entries = list({line.label: line.color[: len(GREY)] for line in lines}.items())
    runs = list(dict.fromkeys(line.run for line in lines))
    if len(runs) > 1:
        for number, run in enumerate(runs):
            entries.append((run, GREY + DASHES[number % len(DASHES)]))
    return entries


def radii(runs: Sequence[TrainingRun]) -> list[Line]:
    """The radius rho of Bi-LoRA's runs: one line for each value."""
    points_by_name: dict[str, Points] = {}
    for run in runs:
        rho = run.run.record["config"].get("rho")
        # A run without steps has none.
        points = []
        if run.run.method == "bilora" and isinstance(rho, int | float):
            points = [(step, float(rho)) for step in sorted({1, run.state.steps} - {0})]
        if not points:
            continue
        name = f"ρ = {rho:g}"
        # A line of several runs is as long as the longest one.
        if name not in points_by_name or points_by_name[name][-1][0] < points[-1][0]:
            points_by_name[name] = points
    return [Line(name, points, GREY + RADIUS) for name, points in points_by_name.items()]


def charts(runs: Sequence[TrainingRun], window: int) -> dict[str, list[Line]]:
    """Lines of each plot, those in the background first, by the names of `TITLES`.

    Args:
        runs: runs to show.
        window: steps of the running mean.
    """
    levels = [run.line(by_level(run.rows)) for run in runs]
    plots = {
        "loss": curves(runs, "loss", window, background=("loss", "each step")),
        "loss-difference": differences(runs, "loss", window),
        "heldout": curves(runs, HELDOUT_LOSS, background=(TRAINING_GRID_LOSS, "training set")),
        "heldout-difference": differences(runs, HELDOUT_LOSS, in_percent=True),
        "distance": curves(runs, HELDOUT_DISTANCE),
        "concepts": by_concept(runs),
        "levels": over_zero(levels, "base model"),
    }
    for name in METRICS:
        plots[name] = curves(runs, name)
    # The last lines lie on top.
    plots["norm"] = curves(runs, "auxiliary_norm", background=UNPROJECTED) + radii(runs)
    plots["rate"] = []
    if any(constant_rate(run) is None for run in runs):
        plots["rate"] = curves(runs, "lr")
    return plots


def constant_rate(run: TrainingRun) -> float | None:
    """The learning rate of a run that has had one rate so far; None where it changes."""
    rates = {rate for _, rate in series(run.rows, "lr")}
    return rates.pop() if len(rates) == 1 else None


UNPROJECTED = ("auxiliary_norm_before", "before the projection")
BELOW_ZERO = "Below zero: lower than LoRA of the same seed. A lower loss is not better samples."
# Each plot's title and caption.
TITLES = {
    "loss": ("Training loss", "Running mean; faint: each step."),
    "loss-difference": (
        "Training loss, difference to LoRA",
        "Below zero: fits the training data better; says nothing of other data.",
    ),
    "heldout": ("Held-out loss", "Faint: on the training set."),
    "heldout-difference": ("Held-out loss, difference to LoRA in %", BELOW_ZERO),
    "distance": ("Distance of samples to held-out images", "By --choose_by samples."),
    "concepts": ("Held-out loss of each concept", "Colors are of concepts here."),
    "levels": (
        "Held-out loss at each noise level",
        "The last measurement minus the base model's; across: the timestep.",
    ),
    **{name: (name.replace("_", " "), "On held-out rows.") for name in METRICS},
    "norm": (
        "Norm of the auxiliary, ‖B₂A₂‖",
        "After the projection; faint: before it; dashed: the radius ρ.",
    ),
    "rate": ("Learning rate", "Of the primary adapter."),
}
