"""A sweep as one picture: the difference of each arm to the control, and the metric over steps.

An arm that went far astray (it diverged, say) would leave no room to tell the others apart, so it
stands at the edge, with its value.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .figures import canvas
from .sweep_result import ArmResult, SweepResult
from .sweep_table import Scale

MARKERS = "osD^vP"
STYLES = ("-", "--", ":", "-.")
ASTRAY = 30.0
"""An arm is off the scale when its difference is so many times the median arm's."""


def plot(result: SweepResult, picture: Path) -> None:
    """Write the picture.

    Left: the paired difference of the last measurement with its interval, one line per arm.
    Right: mean over seeds with a band of one standard error. Both panels give an arm one color;
    its name stands at the left and in the legend.
    """
    import matplotlib

    looks = _looks(result, matplotlib.colormaps["tab10"])
    height = max(3.6, 0.34 * len(result.arms) + 1.6)
    scale = Scale.of(result)
    off = astray(result)
    with canvas(picture, 1, 2, figsize=(12, height)) as (figure, ((left, right),)):
        _differences(left, result, looks, scale, off)
        _curves(right, result, looks, scale, off)
        handles, labels = right.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)


def astray(result: SweepResult) -> frozenset[str]:
    """Labels of the arms whose difference is too large to be drawn beside the others."""
    sizes = {
        arm.label: abs(arm.final.difference.mean) for arm in result.arms if arm.final.difference
    }
    usual = statistics.median(sizes.values()) if sizes else 0.0
    return frozenset(label for label, size in sizes.items() if usual and size > ASTRAY * usual)


def _looks(result: SweepResult, colors: Any) -> dict[str, dict[str, Any]]:
    """Color, marker and line of each arm; the control is black, and no two arms look alike."""
    looks: dict[str, dict[str, Any]] = {}
    others = [arm.label for arm in result.arms if arm.label != result.control]
    for number, label in enumerate(others):
        turn = number // 10
        looks[label] = {
            "color": colors(number % 10),
            "marker": MARKERS[turn % len(MARKERS)],
            "ls": STYLES[turn % len(STYLES)],
        }
    return looks | {result.control: {"color": "black", "marker": ".", "ls": "-"}}


def _differences(
    axis: Any, result: SweepResult, looks: Any, scale: Scale, off: frozenset[str]
) -> None:
    axis.axvline(0, color="black", lw=0.8)
    for row, arm in enumerate(result.arms):
        difference = arm.final.difference
        if difference is not None and arm.label in off:
            _at_the_edge(axis, row, scale.factor * difference.mean, looks[arm.label]["color"])
            continue
        if difference is None:
            # Beside the zero line and not on it: there is no difference to show.
            axis.annotate(
                _why_none(arm, result),
                (0, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="gray",
            )
            continue
        center, low = scale.factor * difference.mean, difference.interval
        if low is not None:
            axis.plot(
                [scale.factor * low.low, scale.factor * low.high],
                [row, row],
                color=looks[arm.label]["color"],
                lw=2,
            )
        axis.plot(center, row, marker=looks[arm.label]["marker"], color=looks[arm.label]["color"])
    axis.set_yticks(range(len(result.arms)), [arm.label for arm in result.arms], fontsize=8)
    for tick, arm in zip(axis.get_yticklabels(), result.arms, strict=True):
        tick.set_color(looks[arm.label]["color"])
    axis.set_ylim(len(result.arms) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    side = "right" if result.higher_is_better else "left"
    axis.set_xlabel(f"difference of {result.metric}{scale.suffix}; {side} is better")
    axis.set_title(f"final, minus {result.control}: mean and 95 % interval", fontsize=9)


def _at_the_edge(axis: Any, row: int, value: float, color: Any) -> None:
    right = value > 0
    axis.annotate(
        f"{value:+.3g} \u2192" if right else f"\u2190 {value:+.3g}",
        (1.0 if right else 0.0, row),
        xycoords=axis.get_yaxis_transform(),
        xytext=(-4 if right else 4, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        fontsize=8,
        color=color,
    )


def _why_none(arm: ArmResult, result: SweepResult) -> str:
    if arm.label == result.control:
        return "control"
    if not arm.seeds:
        return "missing"
    return "not paired" if arm.paired is False else "n/a"


def _curves(axis: Any, result: SweepResult, looks: Any, scale: Scale, off: frozenset[str]) -> None:
    for arm in sorted(result.arms, key=lambda arm: arm.label in off):
        if arm.label in off:  # drawn, but the others set the axis
            axis.autoscale(False)
        if not arm.curve:
            continue
        steps = [point.step for point in arm.curve]
        means = [scale.factor * point.mean for point in arm.curve]
        errors = [scale.factor * point.error for point in arm.curve]
        axis.plot(steps, means, ms=3, lw=1.2, label=arm.label, **looks[arm.label])
        axis.fill_between(
            steps,
            [m - e for m, e in zip(means, errors, strict=True)],
            [m + e for m, e in zip(means, errors, strict=True)],
            color=looks[arm.label]["color"],
            alpha=0.1,
            lw=0,
        )
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(f"{result.metric}{scale.suffix}")
    axis.set_title("over training: mean and standard error over seeds", fontsize=9)
