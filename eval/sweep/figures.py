"""A sweep as one picture: the difference of each arm to the control, and the metric over steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import plot
from ..table import Result
from .findings import is_finished, suffix

FINAL = "final"


def draw(result: Result, picture: Path) -> None:
    """Write the picture.

    Left: the paired difference of the last measurement with its interval, one line per arm.
    Right: mean over seeds with a band of one standard error. Both panels give an arm one color;
    its name stands at the left and in the legend.
    """
    looks = plot.looks(result.groups, result.control)
    height = max(3.6, 0.34 * len(result.groups) + 1.6)
    with plot.canvas(picture, 1, 2, figsize=(12, height)) as (figure, ((left, right),)):
        differences(left, result, looks)
        curves(right, result, looks)
        handles, labels = right.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)


def mean_differences(result: Result) -> dict[str, float]:
    """Mean difference of each variant that has one."""
    name = f"{FINAL} {result.settings['metric']}"
    lines = {arm: result.summary(arm, name) for arm in result.groups}
    return {
        arm: line.difference
        for arm, line in lines.items()
        if line is not None and line.difference is not None
    }


def differences(axis: Any, result: Result, looks: Any) -> None:
    """The paired difference of each arm with its interval."""
    name = f"{FINAL} {result.settings['metric']}"
    scale, values = result.metric(name).scale, mean_differences(result)
    axis.axvline(0, color="black", lw=0.8)
    for row, arm in enumerate(result.groups):
        color = looks[arm]["color"]
        if arm not in values:  # beside the zero line and not on it: there is no difference
            place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
            axis.annotate(
                _why_none(arm, result), (0, row), va="center", fontsize=8, color="gray", **place
            )
        else:
            line = result.summary(arm, name)
            ends = line.difference_interval if line is not None else None
            axis.plot(
                [scale * end for end in ends or ()], [row] * len(ends or ()), color=color, lw=2
            )
            axis.plot(scale * values[arm], row, marker=looks[arm]["marker"], color=color)
    axis.set_yticks(range(len(result.groups)), result.groups, fontsize=8)
    for tick, arm in zip(axis.get_yticklabels(), result.groups, strict=True):
        tick.set_color(looks[arm]["color"])
    axis.set_ylim(len(result.groups) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    side = "right" if result.settings["higher_is_better"] else "left"
    metric = f"{result.settings['metric']}{suffix(result)}"
    axis.set_xlabel(f"difference of {metric}; {side} is better")
    axis.set_title(f"{FINAL}, minus {result.control}: mean and 95 % interval", fontsize=9)


def _why_none(arm: str, result: Result) -> str:
    if arm == result.control:
        return "control"
    if not any(map(is_finished, result.members(arm))):
        return "missing"
    return "not paired" if result.settings["paired"].get(arm) is False else "n/a"


def curves(axis: Any, result: Result, looks: Any) -> None:
    """The metric over steps, mean over seeds."""
    name = result.settings["metric"]
    scale = result.metric(name).scale
    done = replace(result, subjects=[one for one in result.subjects if is_finished(one)])
    for arm in done.groups:
        style = {"ms": 3, "lw": 1.2, "alpha": 0.1, **looks[arm]}
        plot.line(axis, done.curve(arm, name), style.pop("color"), arm, **style)
    axis.yaxis.set_major_formatter(lambda value, _: f"{scale * value:.4g}")
    plot.finish(axis, "over training: mean and standard error over seeds", legend=False)
    axis.set_ylabel(f"{name}{suffix(result)}")
