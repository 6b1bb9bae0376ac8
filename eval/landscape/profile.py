"""Loss along a direction and on the plane of two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from .weights import Loss, Weight, displaceable, evaluate

Tick = Callable[[], None]


def no_tick() -> None:
    """Called after each evaluation of the loss where nobody wants to know."""


def coordinates(radius: float, points: int) -> list[float]:
    """``points`` evenly spaced numbers from -radius to radius, the middle one exactly 0."""
    half = points // 2
    return [radius * (index - half) / half for index in range(points)]


def line(
    weights: Sequence[Weight],
    loss: Loss,
    direction: Iterable[Tensor],
    positions: Sequence[float],
    tick: Tick = no_tick,
) -> list[float]:
    """The loss at w + t d for each position t.

    The weights are bit for bit what they were afterwards, also after an exception.

    Args:
        weights: of the space.
        loss: see ``weights.Loss``.
        direction: a tensor per weight; iterated once per position.
        positions: (points,).
        tick: called after each evaluation.

    Returns:
        (points,).
    """
    losses = []
    with displaceable(weights) as place:
        for position in positions:
            place.move((position, direction))
            losses.append(evaluate(loss))
            tick()
    return losses


def plane(
    weights: Sequence[Weight],
    loss: Loss,
    directions: tuple[Iterable[Tensor], Iterable[Tensor]],
    positions: Sequence[float],
    tick: Tick = no_tick,
) -> list[list[float]]:
    """The loss at w + s d1 + t d2; row s, column t, each over the positions.

    The weights are bit for bit what they were afterwards, also after an exception.
    """
    first, second = directions
    rows = []
    with displaceable(weights) as place:
        for s in positions:
            row = []
            for t in positions:
                place.move((s, first), (t, second))
                row.append(evaluate(loss))
                tick()
            rows.append(row)
    return rows
