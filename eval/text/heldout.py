"""Figures that training recorded on held-out data: the last value of each run, as in Table 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bilora_diffusion import runlog
from bilora_diffusion.errors import UserError

from .schema import PERCENT, POINTS, BenchmarkEntry, Measured
from .subjects import Subject, training_set

PREFIX, LOSS = "heldout_", "heldout_loss"
TITLES = {"matthews": "Matthews", "exact_match": "exact match", "f1": "F1"}


def columns(subjects: Sequence[Subject]) -> list[tuple[BenchmarkEntry, dict[int, Measured]]]:
    """A column per training set and metric: its entry, and position of a run -> last value.

    The loss is a column only where a training set has no other metric.

    Raises:
        UserError: a subject is no run, or recorded nothing.
    """
    found: dict[tuple[str, str], dict[int, Measured]] = {}
    for position, subject in enumerate(subjects):
        if subject.folder is None or not subject.record:
            raise UserError(
                f"{subject.source} has no recorded figures, which --benchmarks heldout shows: name"
                " run folders only."
            )
        for metric, (step, value) in last_values(subject.folder).items():
            key = (training_set(subject.record), metric)
            found.setdefault(key, {})[position] = Measured(value, [], {}, {"step": step})
    judged = {name for name, metric in found if metric != LOSS}
    several = len({name for name, _ in found}) > 1
    return [
        (_entry(name, metric, several), of_runs)
        for (name, metric), of_runs in found.items()
        if metric != LOSS or name not in judged
    ]


def last_values(folder: Path) -> dict[str, tuple[int, float]]:
    """Metric -> (step, value) of the last measurement, "heldout_..." of ``metrics.jsonl``.

    Raises:
        UserError: there is none.
    """
    found = {
        key: (int(row["step"]), float(value))
        for row in runlog.read_metrics(folder)
        for key, value in row.items()
        if key.startswith(PREFIX) and isinstance(value, int | float)
    }
    if not found:
        raise UserError(
            f"{folder} recorded no held-out figure: train it with --validation_file or a task that"
            " has a validation set."
        )
    return found


def _entry(name: str, metric: str, several: bool) -> BenchmarkEntry:
    plain = metric.removeprefix(PREFIX)
    title = TITLES.get(plain, plain)
    loss = metric == LOSS
    return BenchmarkEntry(
        name=f"heldout:{name}:{plain}",
        title=f"{name} {title}" if several else title,
        metric=metric,
        unit=POINTS if loss else PERCENT,
        higher_is_better=not loss,
        settings={"training_set": name},
    )
