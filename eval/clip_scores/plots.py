"""A comparison as pictures: images side by side, differences by prompt, likeness to training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..plot import canvas
from ..table import Result, Summary
from .report import names, per_prompt

GRID, DIFFERENCES, MEMORIZATION = "grid.png", "differences.png", "memorization.png"
CELL_PIXELS = 256
"""Larger images are brought down to this before they are drawn."""
TRUTH = "ground truth"
SHOWN = ("i2t", "t2t", "truth")
BINS = 30


def draw(result: Result, folder: Path, truths: Mapping[str, Image.Image], rows: int) -> list[str]:
    """Write the pictures that the result has values for.

    Args:
        result: its images lie in ``folder``.
        truths: prompt's text -> held-out picture, for a last column of the grid.
        rows: prompts in the grid.

    Returns:
        Their names in ``folder``.
    """
    drawn = {
        GRID: grid(result, folder, truths, rows),
        DIFFERENCES: differences(result, folder / DIFFERENCES),
        MEMORIZATION: memorization(result, folder / MEMORIZATION),
    }
    return [name for name, there in drawn.items() if there]


def grid(result: Result, folder: Path, truths: Mapping[str, Image.Image], rows: int) -> bool:
    """The first prompts at the first seed as in Fig. A1: one a row, one group a column.

    The images of a row share their initial noise. Returns whether there was anything to draw.
    """
    texts = list(names(result))[:rows]
    if not texts:
        return False
    first = result.settings["seeds"][0]
    images = {(r.item, r.group): r.note for r in result.select("image") if r.seed == first}
    heads = [*result.groups, *([TRUTH] if truths.keys() & set(texts) else [])]
    size = (1.5 * len(heads) + 1.2, 1.5 * len(texts) + 0.4)
    with canvas(folder / GRID, len(texts), len(heads), figsize=size) as (_, axes):
        for line, text in zip(axes, texts, strict=True):
            line[0].set_ylabel(_wrapped(names(result)[text]), fontsize=8)
            for group, axis in zip(heads, line, strict=True):
                file = images.get((text, group))
                truth = truths.get(text) if group == TRUTH else None
                _show(axis, Image.open(folder / file) if file else truth)
        for axis, head in zip(axes[0], heads, strict=True):
            axis.set_title(_wrapped(head), fontsize=9)
    return True


def _show(axis: Any, image: Image.Image | None) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if image is None:
        axis.set_frame_on(False)
        return
    shown = image.convert("RGB")
    shown.thumbnail((CELL_PIXELS, CELL_PIXELS))
    axis.imshow(shown, interpolation="lanczos")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 18)[:3])


def differences(result: Result, picture: Path) -> bool:
    """Sorted differences to the control: a row per group, a column per score.

    The line is the mean, the band its 95 % interval. Returns whether there was anything to draw.
    """
    lines = {(s.group, s.metric): s for s in result.summaries if s.metric in SHOWN and s.pairs}
    groups = [group for group in result.groups if any(group == g for g, _ in lines)]
    shown = [name for name in SHOWN if any(name == n for _, n in lines)]
    if not lines:
        return False
    size = (4.2 * len(shown), 2.9 * len(groups) + 0.3)
    with canvas(picture, len(groups), len(shown), figsize=size) as (figure, axes):
        for row, group in zip(axes, groups, strict=True):
            for axis, name in zip(row, shown, strict=True):
                if (group, name) in lines:
                    _sorted_differences(axis, result, lines[group, name])
                else:
                    axis.set_axis_off()
        scorer = result.settings["scorer"]["name"]
        figure.suptitle(f"paired by prompt, cosine x 100 ({scorer})", fontsize=10)
    return True


def _sorted_differences(axis: Any, result: Result, line: Summary) -> None:
    values = per_prompt(result, line.metric)
    own, other = values[line.group], values[line.control]
    changes = sorted(100 * (own[text] - other[text]) for text in own if text in other)
    colors = ["tab:blue" if change > 0 else "tab:orange" for change in changes]
    axis.bar(range(len(changes)), changes, width=1.0, color=colors)
    axis.axhline(0, color="black", lw=0.8)
    mean = 100 * (line.difference or 0.0)
    axis.axhline(mean, color="crimson", lw=1.2)
    if line.difference_interval:
        low, high = line.difference_interval
        axis.axhspan(100 * low, 100 * high, color="crimson", alpha=0.2, lw=0)
    title, rate = result.metric(line.metric).title, 100 * line.win_rate
    axis.set_title(f"{title}: mean {mean:+.2f}, win rate {rate:.0f} %", fontsize=9)
    axis.set_ylabel(_shortened(f"{line.group} minus {line.control}"), fontsize=9)
    axis.set_xlabel("prompts, sorted", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)


def memorization(result: Result, picture: Path) -> bool:
    """How like its nearest training picture each group's images are; returns whether drawn."""
    likeness = {
        group: [100 * (row.value or 0.0) for row in result.select("nearest", group)]
        for group in result.groups
    }
    everything = [value for values in likeness.values() for value in values]
    if not everything:
        return False
    bins = min(BINS, 4 + len(everything) // 10)  # few images would stand in bins of their own
    edges = np.histogram_bin_edges(everything, bins=bins).tolist()
    with canvas(picture, figsize=(6.4, 3.6)) as (_, ((axis,),)):
        for number, (group, values) in enumerate(likeness.items()):
            if values:
                mean, color = float(np.mean(values)), f"C{number}"
                label = f"{_shortened(group)} (mean {mean:.2f})"
                axis.hist(values, bins=edges, histtype="step", lw=1.6, label=label, color=color)
                axis.axvline(mean, color=color, lw=1, ls=":")
        scorer = result.settings["scorer"]["name"]
        axis.set_xlabel(f"cosine x 100 to the nearest training picture ({scorer})")
        axis.set_ylabel("images")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
    return True


def _shortened(label: str, limit: int = 40) -> str:
    return label if len(label) <= limit else f"{label[: limit - 1]}…"
