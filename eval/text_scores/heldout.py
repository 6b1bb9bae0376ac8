"""Figures that training recorded on held-out data: those of each run's weights, as in Table 1.

Those of the base model are what the runs measured before their first step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from bilora_diffusion.errors import UserError
from bilora_diffusion.run.record import last_measured

from ..subjects import BASE, Subject
from ..table import Metric
from .bases import training_set
from .benchmarks import HELDOUT, HELDOUT_LOSS

PREFIX, LOSS = "heldout_", "heldout_loss"
TITLES = {
    "matthews": "Matthews",
    "exact_match": "exact match",
    "answer_match": "answer match",
    "f1": "F1",
    "loss": "held-out loss",
}


@dataclass(frozen=True)
class Column:
    """A training set's metric.

    Args:
        values: label of a subject -> (step, value).
    """

    name: str
    metric: Metric
    settings: dict[str, Any]
    values: dict[str, tuple[int, float]]


def columns(subjects: Sequence[Subject], wanted: Collection[str]) -> list[Column]:
    """A column per training set and metric, losses last.

    Args:
        subjects: runs, and the base model as they met it.
        wanted: HELDOUT for all metrics, and the loss where a training set has no other;
            HELDOUT_LOSS for the loss of each.

    Raises:
        UserError: a subject is no run, or recorded nothing.
    """
    values: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for subject in subjects:
        for metric, value in recorded(subject).items():
            values.setdefault((training_set(subject), metric), {})[subject.label] = value
    judged = {name for name, metric in values if metric != LOSS}
    several = len({name for name, _ in values}) > 1
    return [
        _column(name, metric, several, values[name, metric])
        for name, metric in sorted(values, key=lambda key: key[1] == LOSS)
        if (HELDOUT_LOSS if metric == LOSS else HELDOUT) in wanted
        or (HELDOUT in wanted and name not in judged)
    ]


def recorded(subject: Subject) -> dict[str, tuple[int, float]]:
    """Metric -> (step, value), "heldout_..." of ``metrics.jsonl``: the last of a run, up to the
    step whose weights it left; of the base model what was measured before the first step, which may
    be nothing.

    Raises:
        UserError: the subject is no run, or recorded nothing.
    """
    if subject.folder is None:
        raise UserError(
            f"{subject.source} has no recorded figures, which --benchmarks heldout shows: name run"
            " folders, and base beside no other benchmark."
        )
    best = subject.record.get("results", {}).get("best_step")
    last = 0 if subject.kind == BASE else math.inf if best is None else best
    values = {
        key: (step, float(value))
        for key, (step, value) in last_measured(subject.folder, last).items()
        if key.startswith(PREFIX) and value is not None
    }
    if not values and subject.kind != BASE:
        raise UserError(
            f"{subject.folder} recorded no held-out figure: train it with --validation_file or a"
            " task that has a validation set."
        )
    return values


def _column(name: str, metric: str, several: bool, values: dict[str, tuple[int, float]]) -> Column:
    plain = metric.removeprefix(PREFIX)
    title = TITLES.get(plain, plain)
    title = f"{name} {title}" if several else title
    loss = metric == LOSS
    shown = Metric(title, "", not loss, 1.0 if loss else 100.0, ".4f" if loss else ".2f")
    return Column(
        f"heldout:{name}:{plain}", shown, {"metric": metric, "training_set": name}, values
    )
