"""A sweep's result as ``sweep.csv`` (one row per arm) and ``sweep.md`` (for reading)."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from .markdown import escaped, table
from .runs import TRAINING
from .statistics import Interval, Paired
from .sweep_result import ArmResult, Summary, SweepResult

FIGURES = ("final", "best", "equal_training")


@dataclass(frozen=True)
class Scale:
    """How a metric is written: losses below 1 times 1000 with two places, others as they are."""

    factor: int
    places: int

    @classmethod
    def of(cls, result: SweepResult) -> Scale:
        """The scale that suits the arms' means."""
        means = [abs(arm.final.mean) for arm in result.arms if arm.final.mean is not None]
        small = bool(means) and max(means) < 1 and not result.higher_is_better
        return cls(1000, 2) if small else cls(1, 4)

    @property
    def suffix(self) -> str:
        """For headings."""
        return "" if self.factor == 1 else f" x {self.factor}"

    def value(self, value: float | None, sign: str = "") -> str:
        """A value, ``sign`` "+" for a difference."""
        return "n/a" if value is None else f"{self.factor * value:{sign}.{self.places}f}"

    def interval(self, interval: Interval | None) -> str:
        """An interval in brackets."""
        if interval is None:
            return "[n/a]"
        return f"[{self.value(interval.low, '+')}, {self.value(interval.high, '+')}]"

    def difference(self, difference: Paired | None) -> str:
        """Mean, interval, and in how many seeds the arm is better."""
        if difference is None:
            return "n/a"
        mean, interval = self.value(difference.mean, "+"), self.interval(difference.interval)
        return f"{mean} {interval}, {difference.better}/{difference.seeds}"


def to_csv(result: SweepResult) -> str:
    """One row per arm, unrounded; empty where a figure is not known."""
    rows = [_csv_row(arm, result) for arm in result.arms]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(arm: ArmResult, result: SweepResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": arm.label,
        "control": arm.label == result.control,
        "paired": arm.paired,
        "seeds": len(arm.seeds),
        "missing": len(arm.missing),
    }
    for name in FIGURES:
        summary: Summary = getattr(arm, name)
        difference = summary.difference
        interval = difference.interval if difference else None
        row |= {
            name: summary.mean,
            f"{name}_difference": difference.mean if difference else None,
            f"{name}_low": interval.low if interval else None,
            f"{name}_high": interval.high if interval else None,
            f"{name}_better": difference.better if difference else None,
            f"{name}_pairs": difference.seeds if difference else None,
        }
    return row | {
        "final_training_loss": arm.final_training_loss,
        "seconds_per_step": arm.seconds_per_step,
    }


def to_markdown(result: SweepResult) -> str:
    """The table, and what has to be known to read it."""
    scale = Scale.of(result)
    best = "highest" if result.higher_is_better else "lowest"
    equal = result.equal_training
    at = f" ({scale.value(equal.training_loss)})" if equal else ""
    titles = ["final", f"{best} over training", f"at equal training loss{at}"]
    head = ["arm", "seeds"]
    for title in titles:
        head += [title, "difference"]
    head += [f"final {TRAINING}", "s per step"]
    rows = table(head, [_cells(arm, result, scale) for arm in result.arms])
    notes = [f"- {note}" for note in _notes(result)]
    return "\n".join([_introduction(result, scale), "", rows, "", *notes, ""])


def _introduction(result: SweepResult, scale: Scale) -> str:
    better = "higher" if result.higher_is_better else "lower"
    count = len(result.seeds)
    return (
        f"`{result.metric}`{scale.suffix} of {result.recipe}, {better} is better: mean over"
        f" {count} seed{'s' if count > 1 else ''}. Difference: to {escaped(result.control)},"
        " paired by seed, with its 95 % interval (bootstrap, BCa, 9999 resamples) and the number"
        " of seeds in which the arm is better."
    )


def _cells(arm: ArmResult, result: SweepResult, scale: Scale) -> list[str]:
    label, total = arm.label, len(arm.seeds) + len(arm.missing)
    label = f"{label} (control)" if arm.label == result.control else label
    if not arm.seeds:
        return [label, f"0/{total}", *["missing"] * 8]
    row = [label, f"{len(arm.seeds)}/{total}"]
    for name in FIGURES:
        summary: Summary = getattr(arm, name)
        row += [scale.value(summary.mean), _difference(arm, summary, result, scale)]
    seconds = "n/a" if arm.seconds_per_step is None else f"{arm.seconds_per_step:.3g}"
    return [*row, scale.value(arm.final_training_loss), seconds]


def _difference(arm: ArmResult, summary: Summary, result: SweepResult, scale: Scale) -> str:
    if arm.label == result.control:
        return ""
    return "not paired" if arm.paired is False else scale.difference(summary.difference)


def _notes(result: SweepResult) -> list[str]:
    notes = []
    if result.equal_training is not None:
        notes.append(
            "Equal training loss is the lowest that all paired runs reach; it is set by"
            f" {escaped(result.equal_training.set_by)}."
        )
    others = sum(arm.final.difference is not None for arm in result.arms)
    if others > 2:
        notes.append(
            f"With {others} intervals in a column, one in twenty misses its value by chance alone."
        )
    if 1 < len(result.seeds) < 10:
        notes.append("With fewer than ten seeds a bootstrap interval is too narrow.")
    for arm in result.arms:
        if arm.paired is False:
            notes.append(
                f"{escaped(arm.label)} has not the control's inputs at each step (by their"
                " digests), so it can't be paired."
            )
        if arm.also:
            same = ", ".join(map(escaped, arm.also))
            notes.append(f"{same}: the same run as {escaped(arm.label)}, trained once.")
    for cell in result.cells:
        if cell.status != "finished":
            why = f" (exit code {cell.exit_code}): {cell.error}" if cell.error else ""
            notes.append(f"Missing: {cell.cell}, {cell.status}{why}")
    return notes + _origin(result)


def _origin(result: SweepResult) -> list[str]:
    made = result.provenance
    if made is None:
        return []
    device = made.device.get("name") or "unknown device"
    cores = f", {made.device['cpu_cores']} cores" if made.device.get("type") == "cpu" else ""
    commit = "" if made.commit is None else f", commit {made.commit[:12]}"
    changed = " with uncommitted changes" if made.uncommitted_changes else ""
    notes = [f"`{made.command}`"]
    notes.append(f"{device}{cores}, torch {made.versions.get('torch')}{commit}{changed}.")
    if made.differing:
        what = ", ".join(name.replace("_", " ") for name in made.differing)
        notes.append(f"The runs differ in {json.dumps(what)}; the first run's is given.")
    return notes
