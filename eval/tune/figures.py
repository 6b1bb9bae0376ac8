"""A tuned comparison as one picture: the search, differences, and curves of what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import plot
from ..sweep import figures as sweep
from ..sweep.findings import HELDOUT, suffix
from ..table import Result
from . import choice
from .findings import TRIAL


def draw(result: Result, picture: Path) -> None:
    """Write the picture.

    Left: the lowest mean loss of each method's first trials, on the part that was chosen by.
    Middle: the paired difference at the chosen step. Right: the loss over steps on the part that is
    judged by; a cross is the chosen step.
    """
    looks = plot.looks(result.groups, result.control)
    height = max(3.6, 0.34 * len(result.groups) + 1.6)
    with plot.canvas(picture, 1, 3, figsize=(17, height)) as (figure, ((left, middle, right),)):
        _search(left, result, looks)
        sweep.differences(middle, result, looks, "chosen")
        sweep.curves(right, result, looks, "chosen")
        _mark_chosen(right, result, looks)
        handles, labels = right.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)


def _search(axis: Any, result: Result, looks: Any) -> None:
    settings, scale = result.settings, result.metric(TRIAL).scale
    for method in result.groups:
        means = choice.curves(result.select(TRIAL, method), settings["trial_seeds"])
        lowest = choice.over_budget(means, len(settings["trials"][method]))
        points = [(n, scale * value) for n, value in enumerate(lowest, 1) if value is not None]
        axis.step(*zip(*points, strict=True), where="post", color=looks[method]["color"])
    axis.xaxis.get_major_locator().set_params(integer=True)
    title = f"the search, on part {settings['parts'][0]}: lowest of the first trials"
    plot.finish(axis, title, legend=False, xlabel="trials")
    axis.set_ylabel(f"{HELDOUT}{suffix(result)}")


def _mark_chosen(axis: Any, result: Result, looks: Any) -> None:
    scale = result.metric(HELDOUT).scale
    for method, chosen in result.settings["chosen"].items():
        point = result.summary(method, HELDOUT, step=chosen["step"])
        if point is not None and point.mean is not None and scale:
            axis.plot(chosen["step"], point.mean, "X", ms=9, color=looks[method]["color"])
