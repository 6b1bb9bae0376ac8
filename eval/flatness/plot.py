"""Fig. 3 as PNG: profiles with bands, one panel per space; and the planes as contours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import canvas
from .report import TITLES
from .result import LandscapeResult, RunResult

SHORT = {"lora": "LoRA space", "full": "full space"}
PROFILES, GRIDS = "landscape.png", "landscape_grid.png"


def draw(result: LandscapeResult, folder: Path) -> list[str]:
    """Write the pictures that the result has something for; returns their names."""
    drawn = [PROFILES]
    profiles(result, folder / PROFILES)
    if any(own.grid for entry in result.entries for own in entry.spaces.values()):
        grids(result, folder / GRIDS)
        drawn.append(GRIDS)
    return drawn


def profiles(result: LandscapeResult, picture: Path) -> None:
    """Loss over the position along the directions, mean and band of each group; and below it, where
    there is something to compare, how much more it rises than the control's, paired by seed.
    """
    spaces = result.settings.spaces
    compared = any(own.difference for group in result.groups for own in group.spaces.values())
    rows = [3, 1.6] if compared else [3]
    options = {"figsize": (5.8 * len(spaces), 1.4 * sum(rows)), "height_ratios": rows}
    with canvas(picture, len(rows), len(spaces), sharex="col", **options) as (figure, axes):
        for column, space in zip(axes.T, spaces, strict=True):
            for number, group in enumerate(result.groups):
                if space not in group.spaces:
                    continue
                own, color = group.spaces[space], f"C{number % 10}"
                label = f"{group.label} ({len(group.runs)})"
                positions = result.settings.positions[space]
                _band(column[0], positions, own.profile, own.band, color=color, label=label)
                if compared and own.difference is not None:
                    _band(column[1], positions, own.difference, own.difference_band, color=color)
            column[0].set_title(TITLES[space], fontsize=10)
            column[0].set_ylabel(_loss_name(result))
            column[0].legend(fontsize=8, title="group (runs)", title_fontsize=8)
            if compared:
                column[1].axhline(0, color="black", lw=0.8)
                column[1].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
                column[1].set_ylabel(f"rise minus\n{result.control}'s", fontsize=9)
            for axis in column:
                axis.grid(alpha=0.3)
                axis.margins(x=0)
            column[-1].set_xlabel("step along filter-normalized random directions")
        figure.suptitle(_caption(result), fontsize=9)


def _band(
    axis: Any, positions: Sequence[float], mean: Any, error: Any, *, color: str, label: str = ""
) -> None:
    middle, width = (np.array(values, dtype=float) for values in (mean, error))
    axis.plot(positions, middle, color=color, lw=1.5, label=label)
    axis.fill_between(positions, middle - width, middle + width, color=color, alpha=0.2, lw=0)


def grids(result: LandscapeResult, picture: Path) -> None:
    """Contours of the rise of the loss on the plane: a row per space, a column per group.

    The mean over a group's runs that have a plane; all panels of a row share their levels.
    """
    spaces = [
        space
        for space in result.settings.spaces
        if any(space in e.spaces and e.spaces[space].grid for e in result.entries)
    ]
    groups = [g.label for g in result.groups if _planes(result, g.label, spaces)]
    size = (3.4 * len(groups) + 1.2, 3.3 * len(spaces))
    options = {"figsize": size, "layout": "compressed"}
    with canvas(picture, len(spaces), len(groups), **options) as (figure, axes):
        for row, space in zip(axes, spaces, strict=True):
            drawn = _contours(row, result, space, groups)
            if drawn is not None:
                figure.colorbar(drawn, ax=row, label="rise of the loss")


def _contours(row: Any, result: LandscapeResult, space: str, groups: Sequence[str]) -> Any:
    """Draw a space's panels; returns what a color bar needs, or None without a plane."""
    from matplotlib.ticker import MaxNLocator

    positions = result.settings.grid_positions[space]
    rises = {label: _mean_rise(result, label, space) for label in groups}
    known = [rise[np.isfinite(rise)] for rise in rises.values() if rise is not None]
    values = np.concatenate(known) if known else np.zeros(1)
    levels = MaxNLocator(14).tick_values(values.min(), max(values.max(), 1e-12))
    drawn = None
    for axis, label in zip(row, groups, strict=True):
        rise = rises[label]
        if rise is None:
            axis.set_axis_off()
            continue
        drawn = axis.contourf(positions, positions, rise, levels=levels, cmap="viridis")
        axis.contour(positions, positions, rise, levels=levels, colors="white", linewidths=0.4)
        axis.plot(0, 0, "+", color="white")
        count = len(_planes(result, label, [space]))
        what = f"{count} runs" if count > 1 else "1 run"
        axis.set_title(f"{label} ({what}), {SHORT[space]}", fontsize=9)
        axis.set_xlabel("step along the second direction", fontsize=8)
        axis.set_ylabel("step along the first", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_aspect("equal")
    return drawn


def _planes(result: LandscapeResult, group: str, spaces: list[str]) -> list[RunResult]:
    return [
        entry
        for entry in result.entries
        if entry.group == group
        and any(space in entry.spaces and entry.spaces[space].grid for space in spaces)
    ]


def _mean_rise(result: LandscapeResult, group: str, space: str) -> Any:
    """(positions, positions), x along the second direction; None without a plane."""
    found = [
        np.array(entry.spaces[space].grid, dtype=float) for entry in _planes(result, group, [space])
    ]
    if not found:
        return None
    middle = len(found[0]) // 2
    return np.mean([plane - plane[middle, middle] for plane in found], axis=0)


def _loss_name(result: LandscapeResult) -> str:
    return "training loss" if result.settings.split == "train" else "held-out loss"


def _caption(result: LandscapeResult) -> str:
    several = any(len(group.runs) > 1 for group in result.groups)
    what = "runs" if several else "directions"
    count = result.settings.directions
    along = f"{count} direction{'s' if count > 1 else ''}"
    return f"mean over runs and {along}; band: standard error over {what}"
