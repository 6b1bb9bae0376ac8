"""Figure A3: training loss, held-out loss and their gap over training, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .generalization_result import Difference, GeneralizationResult
from .pictures import canvas, finish, line

FILE = "generalization.png"


def draw(result: GeneralizationResult, folder: Path) -> list[str]:
    """Write the picture; returns its name. The control is black."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"]
    others = [group.label for group in result.groups if group.label != result.control]
    looks = {label: colors(i % 10) for i, label in enumerate(others)} | {result.control: "black"}
    panels = (
        ("training", "loss on what is trained on", "train_grid_loss"),
        ("heldout", "loss on held-out data", "heldout_loss"),
        ("gap", "gap: held-out minus training loss", "gap"),
    )
    with canvas(folder / FILE, 2 if others else 1, 3) as axes:
        for axis, (name, title, ylabel) in zip(axes[0], panels, strict=True):
            for group in result.groups:
                label = f"{group.label}, {len(group.seeds)} seeds"
                line(axis, getattr(group, name), looks[group.label], label, marker=".", ms=4)
            finish(axis, title, ylabel, legend=name == "training")
        for axis, (name, _, ylabel) in zip(axes[-1] if others else (), panels, strict=False):
            axis.axhline(0, color="black", lw=0.8)
            for group in result.groups:
                _differences(axis, group.differences[name], looks[group.label])
            finish(axis, f"minus {result.control}: mean and 95 % interval", ylabel)
    return [FILE]


def _differences(axis: Any, differences: Sequence[Difference], color: Any) -> None:
    axis.plot(
        [d.step for d in differences],
        [d.paired.mean for d in differences],
        color=color,
        marker=".",
    )
    for difference in differences:
        if (interval := difference.paired.interval) is not None:
            axis.plot([difference.step] * 2, [interval.low, interval.high], color=color, lw=1)
