"""A comparison as pictures: paired differences by prompt, and likeness to training pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import canvas
from . import compare
from .schema import METRICS, Comparison, ScoresResult

DIFFERENCES, MEMORIZATION = "differences.png", "memorization.png"
SHOWN = ("i2t", "t2t", "truth")
BINS = 30


def draw(result: ScoresResult, folder: Path) -> list[str]:
    """Write the pictures that the result has values for.

    Returns:
        Their names in ``folder``.
    """
    names = []
    if differences(result, folder / DIFFERENCES):
        names.append(DIFFERENCES)
    if memorization(result, folder / MEMORIZATION):
        names.append(MEMORIZATION)
    return names


def differences(result: ScoresResult, picture: Path) -> bool:
    """Sorted differences to the control: a row per adapter, a column per score.

    The line is the mean, the band its 95 % interval.

    Returns:
        Whether there was anything to draw.
    """
    found = {(row.adapter, row.metric): row for row in result.comparisons if row.metric in SHOWN}
    adapters = sorted({adapter for adapter, _ in found})
    metrics = [name for name in SHOWN if any(metric == name for _, metric in found)]
    if not found:
        return False
    size = (4.2 * len(metrics), 2.9 * len(adapters) + 0.3)
    with canvas(picture, len(adapters), len(metrics), figsize=size) as (figure, axes):
        for line, adapter in zip(axes, adapters, strict=True):
            for axis, metric in zip(line, metrics, strict=True):
                if (adapter, metric) in found:
                    _sorted_differences(axis, result, found[adapter, metric])
                else:
                    axis.set_axis_off()
        figure.suptitle(f"paired by prompt, cosine x 100 ({result.scorer.name})", fontsize=10)
    return True


def _sorted_differences(axis: Any, result: ScoresResult, found: Comparison) -> None:
    table = compare.per_prompt(result, found.metric)
    by_prompt = compare.differences(table, found.adapter, found.control)
    values = sorted(100 * value for value in by_prompt.values())
    colors = ["tab:blue" if value > 0 else "tab:orange" for value in values]
    axis.bar(range(len(values)), values, width=1.0, color=colors)
    axis.axhline(0, color="black", lw=0.8)
    axis.axhline(100 * found.mean, color="crimson", lw=1.2)
    if found.interval is not None:
        low, high = 100 * found.interval.low, 100 * found.interval.high
        axis.axhspan(low, high, color="crimson", alpha=0.2, lw=0)
    adapter, control = (result.adapters[i].label for i in (found.adapter, found.control))
    axis.set_title(
        f"{METRICS[found.metric].title}: mean {100 * found.mean:+.2f},"
        f" win rate {100 * found.win_rate:.0f} %",
        fontsize=9,
    )
    axis.set_ylabel(_shortened(f"{adapter} minus {control}"), fontsize=9)
    axis.set_xlabel("prompts, sorted", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)


def memorization(result: ScoresResult, picture: Path) -> bool:
    """How like its nearest training picture each adapter's images are; returns whether drawn."""
    likeness: dict[int, list[float]] = {}
    for image in result.images:
        if image.nearest is not None:
            likeness.setdefault(image.adapter, []).append(100 * image.nearest)
    if not likeness:
        return False
    import numpy as np

    everything = [value for values in likeness.values() for value in values]
    bins = min(BINS, 4 + len(everything) // 10)  # few images would stand in bins of their own
    edges = np.histogram_bin_edges(everything, bins=bins).tolist()
    with canvas(picture, figsize=(6.4, 3.6)) as (_, ((axis,),)):
        for adapter, values in sorted(likeness.items()):
            label = f"{_shortened(result.adapters[adapter].label)} (mean {np.mean(values):.2f})"
            color = f"C{adapter}"
            axis.hist(values, bins=edges, histtype="step", lw=1.6, label=label, color=color)
            axis.axvline(float(np.mean(values)), color=color, lw=1, ls=":")
        axis.set_xlabel(f"cosine x 100 to the nearest training picture ({result.scorer.name})")
        axis.set_ylabel("images")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
    return True


def _shortened(label: str, limit: int = 40) -> str:
    return label if len(label) <= limit else f"{label[: limit - 1]}…"
