"""State of the chosen runs and their curves, as tables for Gradio's plots. No widgets.

    for name, lines in charts(runs, window=25).items():
        TITLES[name], table(lines)

Colours are of runs, the same in every plot; what stands behind (each step's loss, the training set)
is faint, and what belongs to no run is grey. In the plots of :data:`WITH_LEGEND` colours are of
concepts or configurations, and runs differ by their dashes.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from bilora_diffusion.image.loss import BY_LEVEL
from bilora_diffusion.run.record import BY_CONCEPT
from bilora_diffusion.text.metrics import METRICS
from eval.subjects import differing_options

from .runs import CONTROL, Progress, RunItem

Row = Mapping[str, Any]
Points = list[tuple[int, float]]
"""(step, value), by step."""

COLORS = ("#0d9488", "#ea580c", "#6366f1", "#db2777", "#4d9a0c", "#0284c7", "#b7791f", "#a855f7")
"""Colours of runs; each has a contrast of at least 3 to a light and to a dark page."""
GREY = "#808890"
"""Colour of lines that belong to no run."""
LABEL_COLORS = (
    *("#3b82f6", "#ef4444", "#16a34a", "#8b5cf6", "#d97706", "#8d6e63", "#c0568f", "#0891b2"),
)
"""Colours of concepts and configurations, of the same contrast."""
FAINT, WIDE = "80", "c0"
"""Opacity of a faint line, and of the control's, upon which others are often drawn; by these ends
of a colour ``style.css`` knows them, and draws them thin and broad.
"""
DASHES = ("", "fe", "fd", "fc")
BROAD_DASHES = ("fb", "fa", "f9", "f8")
"""Such ends of a line that is solid, dashed, dotted, or dashed and dotted, by the run's place."""
WITH_LEGEND = ("concepts", "fit")
OTHER_LABEL = "other configurations"
LEVEL = re.compile(rf"{re.escape(BY_LEVEL)}(\d{{1,9}})")
MOST_POINTS = 400  # of one line, about
FOLDER_SETTINGS = ("output_dir", "logging_dir")
"""Settings that differ between any two runs."""
SETTING_WIDTH = 60


@dataclass(frozen=True)
class TrainingRun:
    """A chosen run as it is now; ``color`` is a place among :data:`COLORS`. One that is not
    readable has the reason in its state.
    """

    run: RunItem
    color: int
    rows: list[dict[str, Any]]
    state: Progress
    fit: Row = field(default_factory=dict)
    is_readable: bool = True

    def line(self, points: Points, faint: str = "") -> Line:
        """A line of this run; ``faint`` names a faint one."""
        name = f"{self.run.name}, {faint}" if faint else self.run.name
        end = FAINT if faint else WIDE if self.run.method == CONTROL else ""
        return Line(name, points, COLORS[self.color] + end)


@dataclass(frozen=True)
class Line:
    """A curve with the name that is shown where a pointer is on it.

    Args:
        label, run: names of its colour and of its dashes, in a plot with a legend.
        is_broad: drawn broad there.
    """

    name: str
    points: Points
    color: str = GREY
    label: str = ""
    run: str = ""
    is_broad: bool = False


def differing_settings(runs: Sequence[TrainingRun]) -> dict[str, list[str]]:
    """The settings that the runs do not share: each one's value in every run, as text."""
    configs = [run.run.record["config"] for run in runs]
    result = {}
    for name, values in differing_options(configs).items():
        if name not in FOLDER_SETTINGS:
            texts = ["–" if value is None else str(value) for value in values]
            result[name] = [textwrap.shorten(text, SETTING_WIDTH) for text in texts]
    return result


def series(rows: Sequence[Row], key: str) -> Points:
    """A metric over the steps; rows without it, or with null for a non-finite number, left out."""
    points = []
    for row in rows:
        if type(row.get(key)) in (int, float):  # and not bool, which is an int
            points.append((row["step"], float(row[key])))
    return points


def smooth(points: Points, window: int) -> Points:
    """The mean of each value and up to ``window - 1`` values before it."""
    values = pd.Series([value for _, value in points], dtype=float)
    means = values.rolling(max(1, window), min_periods=1).mean()
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def thin(points: Points, limit: int = MOST_POINTS) -> Points:
    """At most about ``limit`` points: the lowest and the highest of equal stretches of steps.

    The first and the last point stay, so a curve keeps its length and its peaks.
    """
    if len(points) <= limit:
        return points
    chosen = {0, len(points) - 1}
    values = np.asarray([value for _, value in points])
    # The lowest and the highest point of each stretch stay.
    for stretch in np.array_split(np.arange(len(points)), limit // 2):
        chosen |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    return [points[index] for index in sorted(chosen)]


def table(lines: Sequence[Line]) -> pd.DataFrame:
    """The points of lines by "step", "value" (of five digits) and "run"."""
    rows = []
    for line in lines:
        for step, value in thin(line.points):
            rows.append((step, float(f"{value:.5g}"), line.name))
    return pd.DataFrame(rows, columns=["step", "value", "run"])


def ceiling(values: Sequence[float]) -> float | None:
    """End of the vertical axis that cuts rare peaks off; None where none stands out."""
    low, near, high = np.quantile(values, [0, 0.99, 1])
    outstanding = len(values) > 50 and high - low > 3 * (near - low) > 0
    return float(near + 0.06 * (near - low)) if outstanding else None


def curves(
    runs: Sequence[TrainingRun], key: str, window: int = 1, behind: tuple[str, str] | None = None
) -> list[Line]:
    """The running mean of one key of the log.

    Args:
        behind: a key that is drawn faint behind it, and its name in the plot.
    """
    lines = [run.line(smooth(series(run.rows, key), window)) for run in runs]
    if behind is None:
        return lines
    return [*(run.line(series(run.rows, behind[0]), behind[1]) for run in runs), *lines]


def differences(runs: Sequence[TrainingRun], key: str, window: int = 1) -> list[Line]:
    """Each run minus plain LoRA of the same seed on the same data, step by step: such runs see the
    same noise.
    """
    controls: dict[tuple[Any, ...], TrainingRun] = {}
    for run in runs:
        if run.run.method == CONTROL:
            controls.setdefault(_pairing(run.run), run)
    lines = []
    for run in runs:
        control = controls.get(_pairing(run.run), run)
        if control is run:
            continue
        control_values = dict(series(control.rows, key))
        points = []
        for step, value in series(run.rows, key):
            if step in control_values:
                points.append((step, value - control_values[step]))
        lines.append(run.line(smooth(points, window)))
    return over_zero(lines, "LoRA of the same seed")


def _pairing(run: RunItem) -> tuple[Any, ...]:
    return run.seed, run.is_text, run.data_hash


def over_zero(lines: list[Line], name: str) -> list[Line]:
    """The lines, and behind them one at 0."""
    steps = [step for line in lines for step, _ in line.points]
    ends = (min(steps), max(steps)) if steps else ()
    return [Line(name, [(step, 0.0) for step in ends]), *lines]


def by_level(rows: Sequence[Row]) -> Points:
    """Held-out loss at each noise level: the last measurement minus the first."""
    measured = [row for row in rows if "heldout_loss" in row] or [{}]
    first, last = measured[0], measured[-1]
    points = []
    for key, value in last.items():
        level, start = LEVEL.fullmatch(key), first.get(key)
        if level and value is not None and start is not None:
            points.append((int(level[1]), value - start))
    return points


def by_concept(runs: Sequence[TrainingRun]) -> list[Line]:
    """The held-out loss of each concept of each run."""
    lines = []
    for run in runs:
        for key in dict.fromkeys(itertools.chain(*run.rows)):
            concept, points = key.removeprefix(BY_CONCEPT), series(run.rows, key)
            if concept != key and points:
                name = f"{run.run.name}, {concept}"
                lines.append(Line(name, points, label=concept, run=run.run.name))
    return colored(lines)


def of_fits(runs: Sequence[TrainingRun]) -> list[Line]:
    """The held-out losses of each search up to twice its lowest; broad: the choice, or the lowest
    while there is none.
    """
    lines = []
    for run in runs:
        searched = []
        for candidate in run.fit.get("runs", ()):
            both = zip(candidate["steps"], candidate["losses"], strict=True)
            points = [(step, value) for step, value in both if step and value is not None]
            if points:
                name = f"{run.run.name}, {candidate['title']}, fold {candidate['fold']}"
                searched.append(Line(name, points, label=candidate["title"], run=run.run.name))
        lowest: dict[str, float] = {}
        for line in searched:
            loss = min(value for _, value in line.points)
            lowest.setdefault(line.label, loss)
            lowest[line.label] = min(loss, lowest[line.label])
        ranking = sorted(lowest, key=lambda title: lowest[title])
        limit = 2 * min(lowest.values(), default=0.0)
        chosen = (run.fit.get("choice") or {}).get("title", next(iter(ranking), ""))
        best = [chosen, *(title for title in ranking if title != chosen)][: len(LABEL_COLORS)]
        for line in searched:
            points = [point for point in line.points if point[1] <= limit]
            label = line.label if line.label in best else OTHER_LABEL
            if points:
                is_broad = line.label == chosen
                lines.append(replace(line, points=points, label=label, is_broad=is_broad))
    lines.sort(key=lambda line: line.is_broad)  # on top of the others
    return colored(lines)


def colored(lines: Sequence[Line]) -> list[Line]:
    """The lines, each in the colour of its label and with the dashes of its run."""
    labels = list(dict.fromkeys(line.label for line in lines if line.label != OTHER_LABEL))
    runs = list(dict.fromkeys(line.run for line in lines))
    result = []
    for line in lines:
        color = GREY
        if line.label != OTHER_LABEL:
            color = LABEL_COLORS[labels.index(line.label) % len(LABEL_COLORS)]
        ends = BROAD_DASHES if line.is_broad else DASHES
        result.append(replace(line, color=color + ends[runs.index(line.run) % len(ends)]))
    return result


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """The name and the colour of each label and, where several are drawn, of each run."""
    colors = {line.label: line.color[: len(GREY)] for line in lines}
    entries = sorted(colors.items(), key=lambda entry: entry[0] == OTHER_LABEL)
    runs = list(dict.fromkeys(line.run for line in lines))
    if len(runs) > 1:
        for number, run in enumerate(runs):
            entries.append((run, GREY + DASHES[number % len(DASHES)]))
    return entries


def radii(runs: Sequence[TrainingRun]) -> list[Line]:
    """rho: one line for all runs with the same constant one, one a run where it changes."""
    lines: dict[str, Points] = {}
    for run in runs:
        line, config = series(run.rows, "rho"), run.run.record["config"]
        rho, bounded = config.get("rho"), config.get("ball") != "none"
        if not line and bounded and run.run.method == "bilora" and isinstance(rho, int | float):
            line = [(step, float(rho)) for step in sorted({1, run.state.steps} - {0})]
        if not line:
            continue
        constant = len({value for _, value in line}) == 1
        name = f"ρ = {line[0][1]:g}" if constant else f"ρ of {run.run.name}"
        if name not in lines or lines[name][-1][0] < line[-1][0]:  # as long as the longest run
            lines[name] = line
    return [Line(name, points) for name, points in lines.items()]


def charts(runs: Sequence[TrainingRun], window: int) -> dict[str, list[Line]]:
    """Each plot's lines, those behind first, by the names of :data:`TITLES`.

    Args:
        window: of the running mean, in steps.
    """
    levels = [run.line(by_level(run.rows)) for run in runs]
    before = ("auxiliary_norm_before", "before the projection")
    return {
        "loss": curves(runs, "loss", window, ("loss", "each step")),
        "loss-difference": differences(runs, "loss", window),
        "heldout": curves(runs, "heldout_loss", behind=("train_grid_loss", "training set")),
        "heldout-difference": differences(runs, "heldout_loss"),
        "concepts": by_concept(runs),
        "levels": over_zero(levels, "base model"),
        "fit": of_fits(runs),
        **{name: curves(runs, name) for name in METRICS},
        "norm": [*radii(runs), *curves(runs, "auxiliary_norm", behind=before)],
        "rise": curves(runs, "loss_rise", window),
        "rate": curves(runs, "lr"),
    }


BELOW_ZERO = "Below zero: better than LoRA of the same seed."
TITLES = {
    "loss": ("Training loss", "Running mean; faint: each step."),
    "loss-difference": (
        "Training loss, difference to LoRA",
        "Below zero: fits the training data better; says nothing of other data.",
    ),
    "heldout": ("Held-out loss", "Faint: on the training set."),
    "heldout-difference": ("Held-out loss, difference to LoRA", BELOW_ZERO),
    "concepts": ("Held-out loss of each concept", "Colours are of concepts here."),
    "levels": (
        "Held-out loss at each noise level",
        "The last measurement minus the base model's; across: the timestep.",
    ),
    "fit": (
        "Search of --fit",
        "Held-out loss, up to twice the lowest; broad: the choice, or the lowest so far.",
    ),
    **{name: (name.replace("_", " "), "On held-out rows.") for name in METRICS},
    "norm": (
        "Norm of the auxiliary, ‖B₂A₂‖",
        "After the projection; faint: before it. Grey: the radius ρ.",
    ),
    "rise": (
        "Rise of the loss by the auxiliary",
        "To first order, as a share of it; running mean. A radius that sets itself goes by it.",
    ),
    "rate": ("Learning rate", "Of the primary adapter."),
}
"""Each plot's title and caption."""
