"""Figures that training recorded on held-out data: the last value of each run, as in Table 1.

Those of the base model are what the runs measured before their first step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import runlog

from .benchmarks import HELDOUT, HELDOUT_LOSS
from .schema import PERCENT, POINTS, BenchmarkEntry, Measured
from .subjects import BASE, Subject, training_set

PREFIX, LOSS = "heldout_", "heldout_loss"
TITLES = {
    "matthews": "Matthews",
    "exact_match": "exact match",
    "answer_match": "answer match",
    "f1": "F1",
    "loss": "held-out loss",
}


def columns(
    subjects: Sequence[Subject], wanted: Collection[str]
) -> list[tuple[BenchmarkEntry, dict[int, Measured]]]:
    """A column per training set and metric: its entry, and position of a run -> value.

    Args:
        subjects: runs, and the base model as they met it.
        wanted: HELDOUT for all metrics, and the loss where a training set has no other;
            HELDOUT_LOSS for the loss of each.

    Raises:
        UserError: a subject is no run, or recorded nothing.
    """
    found: dict[tuple[str, str], dict[int, Measured]] = {}
    for position, subject in enumerate(subjects):
        if subject.folder is None or not subject.record:
            raise UserError(
                f"{subject.source} has no recorded figures, which --benchmarks heldout shows: name"
                " run folders, and base beside no other benchmark."
            )
        for metric, (step, value) in values(subject.folder, first=subject.kind == BASE).items():
            key = (training_set(subject.record), metric)
            found.setdefault(key, {})[position] = Measured(value, [], {}, {"step": step})
    found = dict(sorted(found.items(), key=lambda item: item[0][1] == LOSS))  # losses come last
    judged = {name for name, metric in found if metric != LOSS}
    several = len({name for name, _ in found}) > 1
    return [
        (_entry(name, metric, several), of_runs)
        for (name, metric), of_runs in found.items()
        if (HELDOUT_LOSS if metric == LOSS else HELDOUT) in wanted
        or (HELDOUT in wanted and name not in judged)
    ]


def values(folder: Path, *, first: bool) -> dict[str, tuple[int, float]]:
    """Metric -> (step, value), "heldout_..." of ``metrics.jsonl``.

    Args:
        folder: of a run.
        first: what was measured before the first step, which may be nothing; else the last of each.

    Raises:
        UserError: nothing was ever measured.
    """
    found = {
        key: (int(row["step"]), float(value))
        for row in runlog.read_metrics(folder)
        if not first or row["step"] == 0
        for key, value in row.items()
        if key.startswith(PREFIX) and isinstance(value, int | float)
    }
    if not found and not first:
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
