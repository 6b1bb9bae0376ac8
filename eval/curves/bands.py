"""Curves of several seeds as one: mean, standard error, and figures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bilora_diffusion.errors import UserError

from ..statistics import Interval, bootstrap_interval, columns, mean

Values = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """Something over training, over a group's seeds.

    Args:
        steps: those that all seeds have.
        mean: None where the value is not defined in every seed.
        error: standard error of the mean, 0 for a single seed.
    """

    steps: list[int]
    mean: list[float | None]
    error: list[float | None]


@dataclass(frozen=True)
class Estimate:
    """One figure of a group: mean over seeds, its 95 % interval (None for one seed), the values."""

    mean: float | None
    interval: Interval | None
    values: dict[int, float]

    @classmethod
    def of(cls, values: Mapping[int, float | None]) -> Estimate:
        """From values by seed; those that are None are left out."""
        found = {seed: value for seed, value in values.items() if value is not None}
        own = list(found.values())
        return cls(mean(own), bootstrap_interval(own), found)

    def minus(self, other: Estimate) -> Estimate:
        """The difference, paired by seed."""
        common = self.values.keys() & other.values.keys()
        return Estimate.of({s: self.values[s] - other.values[s] for s in sorted(common)})


def common_steps(label: str, steps: Sequence[Sequence[int]]) -> list[int]:
    """The steps that all runs of a group have.

    Raises:
        UserError: there are none.
    """
    common = sorted(set.intersection(*(set(own) for own in steps)))
    if not common:
        raise UserError(
            f'the runs of "{label}" have no recorded step in common: group runs that were recorded'
            " at the same steps."
        )
    return common


def curve(steps: Sequence[int], runs: Sequence[Mapping[int, float | None]]) -> Curve:
    """Mean and error at these steps.

    Args:
        runs: step -> value of each seed.
    """
    return Curve(list(steps), *columns([[run.get(step) for step in steps] for run in runs]))


def settles(steps: Sequence[int], values: Values, level: float) -> float | None:
    """The step from which on a curve stays at ``level`` or above.

    Interpolated linearly between the last point below and the next; the first step that has a
    value where none is below; None where the last point is below.
    """
    points = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
    below = [i for i, (_, value) in enumerate(points) if value < level]
    if not below:
        return float(points[0][0]) if points else None
    if below[-1] == len(points) - 1:
        return None
    (left, low), (right, high) = points[below[-1]], points[below[-1] + 1]
    return left + (right - left) * (level - low) / (high - low)
