"""Which training curves there are, drawn for the chosen runs. No widgets here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from bilora_diffusion.text.metrics import METRICS

from .plot import COLORS, Line, plot
from .runs import CONTROL, RunItem
from .training_data import Points, Progress, radius, series, smooth


@dataclass(frozen=True)
class Shown:
    """A chosen run as it is now; ``color`` is a place in :data:`COLORS`."""

    run: RunItem
    color: int
    rows: list[dict[str, Any]]
    state: Progress

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
    what = "Below zero: better than LoRA of the same seed."
    suffix = "-text" if runs[0].run.is_text else ""
    held = "Faint: on the training set."
    drawn = [
        plot(
            "loss" + suffix, "Training loss", "Running mean; faint: each step.", loss(runs, window)
        ),
        plot(
            *("loss-difference" + suffix, "Training loss, difference to LoRA", what),
            differences(runs, "loss", window),
            zero=True,
        ),
        plot(
            "heldout" + suffix, "Held-out loss", held, over(runs, "heldout_loss", "train_grid_loss")
        ),
        plot(
            *("heldout-difference" + suffix, "Held-out loss, difference to LoRA", what),
            differences(runs, "heldout_loss"),
            zero=True,
        ),
        *(
            plot(f"{name}{suffix}", name.replace("_", " "), "On held-out rows.", over(runs, name))
            for name in METRICS
        ),
        plot(
            *("norm" + suffix, "Norm of the auxiliary, ‖B₂A₂‖"),
            "After the projection; faint: before it. Grey: the radius ρ.",
            [*over(runs, "auxiliary_norm", "auxiliary_norm_before"), *radii(runs)],
        ),
        plot("rate" + suffix, "Learning rate", "Of the primary adapter.", rates(runs)),
    ]
    return "".join(drawn)


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
    """rho: one line for all runs with the same constant one, one a run where it is scheduled."""
    lines: dict[str, Points] = {}
    for run in runs:
        line = radius(run.run.record, run.state.steps)
        if not line:
            continue
        constant = run.run.record["config"].get("rho_schedule", "constant") == "constant"
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
    free, found = list(range(len(COLORS))), {}
    for path in chosen[: len(COLORS)]:
        own = known.index(path) % len(COLORS) if path in known else free[0]
        found[path] = own if own in free else free[0]
        free.remove(found[path])
    return found
