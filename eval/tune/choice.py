"""Which trial of a method, and which step of it, has the lowest held-out loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..table import Row


@dataclass(frozen=True)
class Choice:
    """What a method is judged with.

    Args:
        trial: its number, from 1.
        step: at which the mean over the trial's seeds was lowest.
        loss: that mean, on the validation part.
    """

    trial: int
    step: int
    loss: float


Curves = Mapping[int, Mapping[int, float]]
"""Trial -> step -> mean over its seeds."""


def curves(rows: Iterable[Row], seeds: Sequence[int]) -> dict[int, dict[int, float]]:
    """The mean of each trial at each step that all its seeds were measured at.

    A trial that lacks a seed (a run failed) has none, so that all means are over the same seeds.

    Args:
        rows: of one method and metric; the item is the trial's number.
    """
    values: dict[int, dict[int, dict[int | None, float]]] = {}
    for row in rows:
        if row.value is not None and row.step is not None:
            values.setdefault(int(row.item), {}).setdefault(row.step, {})[row.seed] = row.value
    return {
        trial: {
            step: sum(own[seed] for seed in seeds) / len(seeds)
            for step, own in sorted(steps.items())
            if all(seed in own for seed in seeds)
        }
        for trial, steps in sorted(values.items())
    }


def choose(trials: Curves) -> Choice | None:
    """The lowest point of all curves; of equal ones the first trial's first. None without any."""
    points = (
        Choice(trial, step, loss) for trial, curve in trials.items() for step, loss in curve.items()
    )
    return min(points, key=lambda point: (point.loss, point.trial, point.step), default=None)


def over_budget(trials: Curves, budget: int) -> list[float | None]:
    """The lowest point among the first 1, 2, ..., ``budget`` trials."""
    lowest: list[float | None] = []
    for number in range(1, budget + 1):
        found = choose({trial: curve for trial, curve in trials.items() if trial <= number})
        lowest.append(None if found is None else found.loss)
    return lowest
