"""Which training curves there are for the chosen runs, drawn as HTML. No widgets here.

Lines are an SVG that fits any width, with text beside it in the page's font. The lines' names stand
at their ends, so that no legend has to be looked up, and what stands behind (each step's loss, the
training set) is faint. Colours are of runs, the same in every plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from bilora_diffusion.text.metrics import METRICS

from .runs import CONTROL, RunItem
from .training_data import (
    Points,
    Progress,
    Row,
    by_level,
    pairs,
    radius,
    series,
    smooth,
    thin,
)

COLORS = 8
"""So many ``style.css`` has for runs, each in light and dark."""
DIFFERENCES = ("loss-difference", "heldout-difference")
BY_ZERO = (*DIFFERENCES, "levels")
TICKS = 5
LABEL_HEIGHT = 0.065
"""Of a line's name, as a share of the plot's height."""
LOWEST = 0.95
"""Place of the lowest name, above the numbers of the axis."""


@dataclass(frozen=True)
class Shown:
    """A chosen run as it is now; ``color`` is a place among :data:`COLORS`."""

    run: RunItem
    color: int
    rows: list[dict[str, Any]]
    state: Progress
    folds: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.name

    @property
    def wide(self) -> bool:
        """Whether it is the control, which others are often drawn upon."""
        return self.run.method == CONTROL


@dataclass(frozen=True)
class Failed:
    """A chosen run that can't be read, and why."""

    name: str
    color: int
    reason: str


def draw(runs: Sequence[Shown], window: int) -> str:
    """All plots as HTML, those of images and of text apart.

    Args:
        window: of the running mean, in steps.
    """
    kinds = {"Runs on images": [run for run in runs if not run.run.is_text]}
    kinds["Runs on text"] = [run for run in runs if run.run.is_text]
    kinds = {heading: own for heading, own in kinds.items() if own}
    text = ""
    for heading, own in kinds.items():
        text += f"<h3>{escape(heading)}</h3>" if len(kinds) > 1 else ""
        text += f'<div class="plots">{_plots(own, window)}</div>'
    return text


def _plots(runs: Sequence[Shown], window: int) -> str:
    held = over(runs, "heldout_loss", "train_grid_loss")
    norms = [*over(runs, "auxiliary_norm", "auxiliary_norm_before"), *radii(runs)]
    to_lora, below = "difference to LoRA", "Below zero: better than LoRA of the same seed."
    projected = "After the projection; faint: before it. Grey: the radius ρ."
    at_levels = "The last measurement minus the base model's; across: the timestep."
    risen = "To first order, as a share of it; running mean. A radius that sets itself goes by it."
    of_all = "Their mean, which chose the number of steps; faint: each of them."
    lines = {
        ("loss", "Training loss", "Running mean; faint: each step."): loss(runs, window),
        (DIFFERENCES[0], f"Training loss, {to_lora}", below): differences(runs, "loss", window),
        ("heldout", "Held-out loss", "Faint: on the training set."): held,
        (DIFFERENCES[1], f"Held-out loss, {to_lora}", below): differences(runs, "heldout_loss"),
        ("levels", "Held-out loss at each noise level", at_levels): [
            Line(run.name, by_level(run.rows), run.color, wide=run.wide) for run in runs
        ],
        ("folds", "Held-out loss of the folds", of_all): of_folds(runs),
        **{
            (name, name.replace("_", " "), "On held-out rows."): over(runs, name)
            for name in METRICS
        },
        ("norm", "Norm of the auxiliary, ‖B₂A₂‖", projected): norms,
        ("rise", "Rise of the loss by the auxiliary", risen): [
            Line(run.name, smooth(series(run.rows, "loss_rise"), window), run.color, wide=run.wide)
            for run in runs
        ],
        ("rate", "Learning rate", "Of the primary adapter."): rates(runs),
    }
    suffix = "-text" if runs[0].run.is_text else ""
    return "".join(
        plot(name + suffix, title, caption, own, zero=name in BY_ZERO)
        for (name, title, caption), own in lines.items()
    )


def loss(runs: Sequence[Shown], window: int) -> list[Line]:
    """Training loss: each step's faint, the running mean over it."""
    lines = []
    for run in runs:
        raw = series(run.rows, "loss")
        lines += [Line(run.name, raw, run.color, faint=True)]
        lines += [Line(run.name, smooth(raw, window), run.color, wide=run.wide)]
    return lines


def over(runs: Sequence[Shown], key: str, behind: str | None = None) -> list[Line]:
    """One key of the log, and another faint behind it."""
    lines = [Line(run.name, series(run.rows, key), run.color, wide=run.wide) for run in runs]
    if behind:
        lines += [Line(run.name, series(run.rows, behind), run.color, faint=True) for run in runs]
    return lines


def of_folds(runs: Sequence[Shown]) -> list[Line]:
    """The folds' held-out losses over the steps, and their mean."""
    lines = []
    for run in runs:
        for curve in (*run.folds["folds"], run.folds["mean"]) if run.folds else ():
            faint = curve is not run.folds["mean"]
            lines.append(Line(run.name, pairs(run.folds["steps"], curve), run.color, faint))
    return lines


def differences(runs: Sequence[Shown], key: str, window: int = 1) -> list[Line]:
    """Each run minus plain LoRA of the same seed, step by step: paired runs see the same noise."""
    controls = {run.run.seed: run for run in reversed(runs) if run.run.method == CONTROL}
    lines = []
    for run in runs:
        control = controls.get(run.run.seed)
        if control is None or control is run:
            continue
        other = dict(series(control.rows, key))
        points = [(at, value - other[at]) for at, value in series(run.rows, key) if at in other]
        lines.append(Line(run.name, smooth(points, window), run.color))
    return lines


def radii(runs: Sequence[Shown]) -> list[Line]:
    """rho: one line for all runs with the same constant one, one a run where it changes."""
    lines: dict[str, Points] = {}
    for run in runs:
        line = series(run.rows, "rho") or radius(run.run.record, run.state.steps)
        if not line:
            continue
        constant = len({value for _, value in line}) == 1
        name = f"ρ = {line[0][1]:g}" if constant else f"ρ of {run.name}"
        if name not in lines or lines[name][-1][0] < line[-1][0]:  # as long as the longest run
            lines[name] = line
    return [Line(name, points, None) for name, points in lines.items()]


def rates(runs: Sequence[Shown]) -> list[Line]:
    """The primary's learning rate; one line where all runs have the same."""
    lines = over(runs, "lr")
    if len(lines) > 1 and all(line.points == lines[0].points for line in lines):
        return [Line("all runs", lines[0].points, None)]
    return lines


def colors_of(chosen: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """The place of a colour for each of up to eight chosen runs, all different.

    A run keeps its colour whatever else is chosen, except where two would have the same one.

    Args:
        known: all runs there are.
    """
    free, found = list(range(COLORS)), {}
    for path in chosen[:COLORS]:
        own = known.index(path) % COLORS if path in known else free[0]
        found[path] = own if own in free else free[0]
        free.remove(found[path])
    return found


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: at its end and for screen readers.
        color: place among :data:`COLORS`; None for a line that belongs to no run, such as rho.
        faint: whether it stands behind the others, without a name of its own.
        wide: whether it is drawn broadly under the others, so that it shows beside one on it.
    """

    name: str
    points: Points
    color: int | None
    faint: bool = False
    wide: bool = False


def plot(name: str, title: str, caption: str, lines: Sequence[Line], zero: bool = False) -> str:
    """A plot as HTML; "" where no line has a point.

    Args:
        name: of its element in the page.
        zero: whether a line at 0 belongs to it, as in a difference.
    """
    lines = [replace(line, points=thin(line.points)) for line in lines if line.points]
    if not lines:
        return ""
    low, high = limits([value for line in lines for _, value in line.points], zero)
    last = max(1, *(line.points[-1][0] for line in lines))

    def y(value: float) -> float:
        return 1 - (value - low) / (high - low)

    order = sorted(lines, key=lambda line: (not line.faint, not line.wide))
    drawn = "".join(_path(line, last, y) for line in order)
    if zero:
        drawn = f'<path class="zero" d="M0 {y(0):.4f}H1"/>' + drawn
    down = "".join(_tick("top", y(value), f"{value:g}") for value in ticks(low, high))
    along = "".join(_tick("left", value / last, f"{value:g}") for value in ticks(0, last))
    ends = [f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines if not line.faint]
    said = escape(f"{title}: {'; '.join(ends)}")
    return (
        f'<figure class="plot" id="training-{name}"><h4>{escape(title)}</h4>'
        f'<p>{escape(caption)}</p><div class="area" role="img" aria-label="{said}">'
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'
        f'<div class="down">{down}</div><div class="along">{along}</div>{_names(lines, y)}</div>'
        "</figure>"
    )


def limits(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """The ends of the vertical axis, a little beyond the values; rare peaks are cut off."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    near = ordered[int(0.99 * len(ordered))]
    if len(ordered) > 50 and high - low > 3 * (near - low) > 0:
        high = near
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.06 * (high - low) or 0.05 * abs(high)
    room = room if room > 1e-300 else 1.0  # a fifth of it is a number still
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, about five."""
    raw = (high - low) / TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= raw)
    first, final = math.ceil(low / step), math.floor(high / step)
    return [float(f"{n * step:.12g}") for n in range(first, final + 1)]


def _path(line: Line, last: int, y: Callable[[float], float]) -> str:
    d = "L".join(f"{step / last:.5f} {y(value):.5f}" for step, value in line.points)
    kind = _color(line) + " faint" * line.faint + " wide" * (line.wide and not line.faint)
    return f'<path class="{kind}" d="M{d}"><title>{escape(line.name)}</title></path>'


def _color(line: Line) -> str:
    return "of-none" if line.color is None else f"of-{line.color}"


def _tick(side: str, at: float, text: str) -> str:
    return f'<span style="{side}: {100 * at:.2f}%">{text}</span>'


def _names(lines: Sequence[Line], y: Callable[[float], float]) -> str:
    """Names at the lines' ends, moved apart where two would lie over one another."""
    named = sorted(
        (line for line in lines if not line.faint), key=lambda line: y(line.points[-1][1])
    )
    places: list[float] = []
    for line in named:
        wanted = min(max(y(line.points[-1][1]), LOWEST - 1), LOWEST)
        places.append(max(wanted, places[-1] + LABEL_HEIGHT) if places else wanted)
    over = max(0.0, places[-1] - LOWEST) if places else 0.0
    text = "".join(
        f'<span class="{_color(line)}" style="top: {100 * (at - over):.2f}%">'
        f"{escape(line.name)}</span>"
        for line, at in zip(named, places, strict=True)
    )
    return f'<div class="names">{text}</div>'
