"""The paper's Figure 3: profiles of the loss in a panel for each space, and contours on planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..results import plot
from ..results.table import Entry, Result

# Space -> its title
TITLES = {"lora": "LoRA space (A and B)", "full": "full space (weights without the adapters)"}
PROFILES, GRIDS = "landscape.png", "landscape_grid.png"
# Maximum number of intervals between contour levels
CONTOURS = 14


class RunLosses(NamedTuple):
    """The losses around the weights of one run."""

    run: Entry
    values: np.ndarray  # (directions, positions); for a plane (positions, positions)


def draw(result: Result, folder: Path) -> list[str]:
    """Draw the profiles and, if they were measured, the planes; return the pictures' names."""
    draw_profiles(result, folder / PROFILES)
    if not result.select("plane"):
        return [PROFILES]
    draw_planes(result, folder / GRIDS)
    return [PROFILES, GRIDS]


def draw_profiles(result: Result, picture: Path) -> None:
    """Draw the loss over the position along the directions, with a mean and a band for each group.

    If runs can be paired by seed, the panels below show the rise of the loss minus the rise of the
    control's loss.
    """
    spaces = result.settings["spaces"]
    styles = plot.group_styles(result.groups, result.control)
    differences = {space: _differences(result, space) for space in spaces}
    heights = [3, 1.6] if any(differences.values()) else [3]
    size = (5.8 * len(spaces), 1.4 * sum(heights))
    xlabel = "step along filter-normalized random directions"
    with plot.canvas(
        picture, len(heights), len(spaces), sharex="col", figsize=size, height_ratios=heights
    ) as (_, axes):
        for column, space in zip(axes.T, spaces, strict=True):
            positions = result.settings["positions"][space]
            for group in result.groups:
                runs = _losses(result, "profile", group, space)
                if not runs:
                    continue
                # The band is over the means of several runs, or over the directions of one run.
                lines = runs[0].values
                if len(runs) > 1:
                    lines = np.array([run.values.mean(0) for run in runs])
                label = f"{group} ({len(runs)})"
                _draw_mean(column[0], positions, lines, styles[group]["color"], label)
            for group, rises in differences[space].items():
                _draw_mean(column[1], positions, np.array(rises), styles[group]["color"])
            plot.finish(column[0], TITLES[space], "training loss", xlabel=xlabel)
            for axis in column[1:]:
                axis.axhline(0, color="black", lw=0.8)
                plot.finish(axis, "", f"rise minus\n{result.control}'s", xlabel=xlabel)


def _losses(result: Result, metric: str, group: str, space: str) -> list[RunLosses]:
    """Return the losses of each run of a group that has rows of a metric.

    Args:
        result: result of the command.
        metric: "profile", with an array row for each direction, or "plane", with an array row for
            each position on the first axis.
        group: label of the group.
        space: "lora" or "full".
    """
    setting = "positions" if metric == "profile" else "grid_positions"
    rows = result.select(metric, group, space)
    runs = []
    for run in result.members(group):
        values = [row.value for row in rows if row.subject == run.label]
        if values:
            width = len(result.settings[setting][space])
            runs.append(RunLosses(run, np.array(values, dtype=float).reshape(-1, width)))
    return runs


def _differences(result: Result, space: str) -> dict[str, list[np.ndarray]]:
    """Return the rise of the loss minus the control's rise with the same seed, by group.

    A group has an array (positions,) for each seed that the control has too.
    """
    # group -> seed -> rise at each position, mean over directions
    rises: dict[str, dict[int | None, np.ndarray]] = {}
    for group in result.groups:
        for run, losses in _losses(result, "profile", group, space):
            mean = losses.mean(0)  # over directions, (positions,)
            rises.setdefault(group, {})[run.seed] = mean - mean[len(mean) // 2]
    control_rises = rises.pop(result.control, {})
    differences: dict[str, list[np.ndarray]] = {}
    for group, by_seed in rises.items():
        for seed, rise in by_seed.items():
            if seed is not None and seed in control_rises:
                differences.setdefault(group, []).append(rise - control_rises[seed])
    return differences


def _draw_mean(
    axis: Any, positions: Sequence[float], lines: np.ndarray, color: Any, label: str = ""
) -> None:
    """Draw the mean of ``lines``, (lines, positions), with a band of one standard error."""
    mean = lines.mean(0)  # (positions,)
    error = np.zeros(len(positions))
    if len(lines) > 1:
        error = lines.std(0, ddof=1) / len(lines) ** 0.5
    plot.draw_band(axis, positions, mean, mean - error, mean + error, color, label or None)


def draw_planes(result: Result, picture: Path) -> None:
    """Draw contours of the rise of the loss: a row for each space and a column for each group.

    A panel shows the plane of the group's first run. All panels of a row have the same levels.
    """
    spaces = list(result.settings["grid_positions"])
    groups = [group for group in result.groups if result.select("plane", group)]
    size = (3.4 * len(groups) + 1.2, 3.3 * len(spaces))
    with plot.canvas(picture, len(spaces), len(groups), figsize=size, layout="compressed") as (
        figure,
        axes,
    ):
        for row, space in zip(axes, spaces, strict=True):
            contours = _draw_contours(row, result, space, groups)
            figure.colorbar(contours, ax=row, label="rise of the loss")


def _draw_contours(row: Any, result: Result, space: str, groups: Sequence[str]) -> Any:
    """Draw the panels of a space, and return the contours of the last panel for the color bar."""
    from matplotlib.ticker import MaxNLocator

    positions = result.settings["grid_positions"][space]
    middle = len(positions) // 2
    rises = {}
    for group in groups:
        runs = _losses(result, "plane", group, space)
        if runs:
            rises[group] = runs[0].values - runs[0].values[middle, middle]
    values = np.concatenate([rise[np.isfinite(rise)] for rise in rises.values()])
    # The highest level is above zero, so that a flat plane has levels too.
    levels = MaxNLocator(CONTOURS).tick_values(values.min(), max(values.max(), 1e-12))
    contours = None
    for axis, group in zip(row, groups, strict=True):
        if group not in rises:
            axis.set_axis_off()
            continue
        contours = axis.contourf(positions, positions, rises[group], levels=levels, cmap="viridis")
        axis.plot(0, 0, "+", color="white")
        xlabel = "step along the second direction"
        title = f"{group}, {space} space"
        plot.finish(axis, title, "step along the first direction", legend=False, xlabel=xlabel)
        axis.set_aspect("equal")
    return contours
