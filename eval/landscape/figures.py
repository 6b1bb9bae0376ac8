"""Fig. 3: profiles with bands, one panel per space; and the planes as contours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import plot
from ..table import Entry, Result
from . import TITLES, grounds

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
    with plot.canvas(picture, len(rows), len(spaces), sharex="col", **options) as (figure, axes):
        for column, space in zip(axes.T, spaces, strict=True):
            for group in result.groups:
                runs = [losses for _, losses in _losses(result, "profile", group, space)]
                if runs:
                    over = [own.mean(0) for own in runs] if len(runs) > 1 else runs[0]
                    style = {"color": looks[group]["color"], "label": f"{group} ({len(runs)})"}
                    _band(column[0], result.settings["positions"][space], over, **style)
            for group, rises in lower[space].items():
                color = looks[group]["color"]
                _band(column[1], result.settings["positions"][space], rises, color=color)
            _finish(column, result, space)
        figure.suptitle(_caption(result), fontsize=9)


def _losses(result: Result, metric: str, group: str, space: str) -> list[tuple[Entry, np.ndarray]]:
    """What was measured of each run of a group, a line per direction or position."""
    known = "positions" if metric == "profile" else "grid_positions"
    rows = result.select(metric, group, space)
    found = []
    for entry in result.members(group):
        values = [row.value for row in rows if row.subject == entry.label]
        if values:
            width = len(result.settings[known][space])
            found.append((entry, np.array(values, dtype=float).reshape(-1, width)))
    return found


def _differences(result: Result, space: str) -> dict[str, list[np.ndarray]]:
    """Of each group but the control, how much more each seed's loss rises than the control's."""
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
    """Mean of (lines, positions) with a band of one standard error."""
    values = np.array(lines)
    middle, width = values.mean(0), np.zeros(len(positions))
    if len(values) > 1:
        width = values.std(0, ddof=1) / len(values) ** 0.5
    axis.plot(positions, middle, color=color, lw=1.5, label=label)
    axis.fill_between(positions, middle - width, middle + width, color=color, alpha=0.2, lw=0)


def _finish(column: Any, result: Result, space: str) -> None:
    column[0].set_title(TITLES[space], fontsize=10)
    column[0].set_ylabel(f"{grounds(result)} loss")
    column[0].legend(fontsize=8, title="group (runs)", title_fontsize=8)
    for axis in column[1:]:
        axis.axhline(0, color="black", lw=0.8)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        axis.set_ylabel(f"rise minus\n{result.control}'s", fontsize=9)
    for axis in column:
        axis.grid(alpha=0.3)
        axis.margins(x=0)
    column[-1].set_xlabel("step along filter-normalized random directions")


def _caption(result: Result) -> str:
    several = any(len(result.members(group)) > 1 for group in result.groups)
    count = result.settings["directions"]
    along = f"{count} direction{'s' if count > 1 else ''}"
    over = "runs" if several else "directions"
    return f"mean over runs and {along}; band: standard error over {over}"


def planes(result: Result, picture: Path) -> None:
    """Contours of the rise of the loss on the plane: a row per space, a column per group.

    The mean over a group's runs that have a plane; all panels of a row share their levels.
    """
    spaces = list(result.settings["grid_positions"])
    groups = [group for group in result.groups if result.select("plane", group)]
    size = (3.4 * len(groups) + 1.2, 3.3 * len(spaces))
    options = {"figsize": size, "layout": "compressed"}
    with plot.canvas(picture, len(spaces), len(groups), **options) as (figure, axes):
        for row, space in zip(axes, spaces, strict=True):
            shown = _contours(row, result, space, groups)
            figure.colorbar(shown, ax=row, label="rise of the loss")


def _contours(row: Any, result: Result, space: str, groups: Sequence[str]) -> Any:
    """Draw a space's panels; returns what a color bar needs."""
    from matplotlib.ticker import MaxNLocator

    positions = result.settings["grid_positions"][space]
    middle, drawn = len(positions) // 2, None
    rises = {
        group: [losses - losses[middle, middle] for _, losses in own]
        for group in groups
        if (own := _losses(result, "plane", group, space))
    }
    means = {group: np.mean(own, axis=0) for group, own in rises.items()}
    values = np.concatenate([mean[np.isfinite(mean)] for mean in means.values()])
    levels = MaxNLocator(14).tick_values(values.min(), max(values.max(), 1e-12))
    for axis, group in zip(row, groups, strict=True):
        if group not in means:
            axis.set_axis_off()
            continue
        drawn = axis.contourf(positions, positions, means[group], levels=levels, cmap="viridis")
        axis.contour(
            positions, positions, means[group], levels=levels, colors="white", linewidths=0.4
        )
        axis.plot(0, 0, "+", color="white")
        count = len(rises[group])
        what = f"{count} runs" if count > 1 else "1 run"
        axis.set_title(f"{group} ({what}), {space} space", fontsize=9)
        axis.set_xlabel("step along the second direction", fontsize=8)
        axis.set_ylabel("step along the first", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_aspect("equal")
    return drawn
