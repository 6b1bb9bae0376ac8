"""Fig. 3: profiles with bands, one panel per space; and the planes as contours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import plot
from ..table import Entry, Result
from . import TITLES

PROFILES, GRIDS = "landscape.png", "landscape_grid.png"


def draw(result: Result, folder: Path) -> list[str]:
    """Write the pictures that the result has something for; returns their names."""
    profiles(result, folder / PROFILES)
    if not result.select("plane"):
        return [PROFILES]
    planes(result, folder / GRIDS)
    return [PROFILES, GRIDS]


def profiles(result: Result, picture: Path) -> None:
    """Loss over the position along the directions, mean and band of each group; and below it, where
    there is something to compare, how much more it rises than the control's, paired by seed.
    """
    spaces, looks = result.settings["spaces"], plot.looks(result.groups, result.control)
    lower = {space: _differences(result, space) for space in spaces}
    rows = [3, 1.6] if any(lower.values()) else [3]
    options = {"figsize": (5.8 * len(spaces), 1.4 * sum(rows)), "height_ratios": rows}
    with plot.canvas(picture, len(rows), len(spaces), sharex="col", **options) as (_, axes):
        for column, space in zip(axes.T, spaces, strict=True):
            positions = result.settings["positions"][space]
            for group in result.groups:
                if runs := [losses for _, losses in _losses(result, "profile", group, space)]:
                    lines = [own.mean(0) for own in runs] if len(runs) > 1 else runs[0]
                    label = f"{group} ({len(runs)})"
                    _band(column[0], positions, lines, looks[group]["color"], label)
            for group, rises in lower[space].items():
                _band(column[1], positions, rises, looks[group]["color"])
            xlabel = "step along filter-normalized random directions"
            plot.finish(column[0], TITLES[space], "training loss", xlabel=xlabel)
            for axis in column[1:]:
                axis.axhline(0, color="black", lw=0.8)
                plot.finish(axis, "", f"rise minus\n{result.control}'s", xlabel=xlabel)


def _losses(result: Result, metric: str, group: str, space: str) -> list[tuple[Entry, np.ndarray]]:
    """Losses of each run of a group, a line per direction or position."""
    known = "positions" if metric == "profile" else "grid_positions"
    rows = result.select(metric, group, space)
    losses = []
    for entry in result.members(group):
        values = [row.value for row in rows if row.subject == entry.label]
        if values:
            width = len(result.settings[known][space])
            losses.append((entry, np.array(values, dtype=float).reshape(-1, width)))
    return losses


def _differences(result: Result, space: str) -> dict[str, list[np.ndarray]]:
    """Rise of each seed's loss beyond the control's, of each other group."""
    rises: dict[str, dict[int | None, np.ndarray]] = {}
    for group in result.groups:
        for entry, losses in _losses(result, "profile", group, space):
            mean = losses.mean(0)
            rises.setdefault(group, {})[entry.seed] = mean - mean[len(mean) // 2]
    base = rises.pop(result.control, {})
    return {
        group: pairs
        for group, own in rises.items()
        if (pairs := [own[seed] - base[seed] for seed in own if seed in base and seed is not None])
    }


def _band(axis: Any, positions: Sequence[float], lines: Any, color: Any, label: str = "") -> None:
    """Mean of (lines, positions), over runs or a run's directions, with a standard error's band."""
    values = np.array(lines)
    middle, width = values.mean(0), np.zeros(len(positions))
    if len(values) > 1:
        width = values.std(0, ddof=1) / len(values) ** 0.5
    axis.plot(positions, middle, color=color, lw=1.5, label=label or None)
    axis.fill_between(positions, middle - width, middle + width, color=color, alpha=0.2, lw=0)


def planes(result: Result, picture: Path) -> None:
    """Contours of the rise of the loss on the plane: a row per space, a column per group.

    The plane is that of a group's first run; all panels of a row share their levels.
    """
    spaces = list(result.settings["grid_positions"])
    groups = [group for group in result.groups if result.select("plane", group)]
    size = (3.4 * len(groups) + 1.2, 3.3 * len(spaces))
    options = {"figsize": size, "layout": "compressed"}
    with plot.canvas(picture, len(spaces), len(groups), **options) as (figure, axes):
        for row, space in zip(axes, spaces, strict=True):
            contours = _contours(row, result, space, groups)
            figure.colorbar(contours, ax=row, label="rise of the loss")


def _contours(row: Any, result: Result, space: str, groups: Sequence[str]) -> Any:
    """Draw a space's panels; returns what a color bar needs."""
    from matplotlib.ticker import MaxNLocator

    positions = result.settings["grid_positions"][space]
    middle, drawn = len(positions) // 2, None
    rises = {
        group: own[0][1] - own[0][1][middle, middle]
        for group in groups
        if (own := _losses(result, "plane", group, space))
    }
    values = np.concatenate([rise[np.isfinite(rise)] for rise in rises.values()])
    levels = MaxNLocator(14).tick_values(values.min(), max(values.max(), 1e-12))
    for axis, group in zip(row, groups, strict=True):
        if group not in rises:
            axis.set_axis_off()
            continue
        drawn = axis.contourf(positions, positions, rises[group], levels=levels, cmap="viridis")
        axis.plot(0, 0, "+", color="white")
        title, xlabel = f"{group}, {space} space", "step along the second direction"
        plot.finish(axis, title, "step along the first", legend=False, xlabel=xlabel)
        axis.set_aspect("equal")
    return drawn
