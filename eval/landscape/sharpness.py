"""SAM sharpness (Foret et al. 2021, https://arxiv.org/abs/2010.01412, Eq. 1; the paper, Eq. 2).

    max over ||e|| <= rho of L(w + e) - L(w)

by projected gradient ascent, one norm over all weights of the space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .directions import gaussian
from .profile import Tick, no_tick
from .weights import Loss, Place, Weight, differentiable, displaceable, loss_and_gradient, norm


@dataclass(frozen=True)
class Sharpness:
    """What the ascent found.

    Args:
        value: the highest L(w + e) - L(w) that was found; at least 0, which e = 0 has.
        one_step: the same at e = rho g / ||g||, SAM's own perturbation.
        distance: ||e|| where the value was found.
        gradient_norm: ||g|| at w.
        per_start: the highest value from each start: first e = 0, then random points of the sphere.
    """

    value: float
    one_step: float
    distance: float
    gradient_norm: float
    per_start: list[float]


class _Point(NamedTuple):
    """A displacement, the loss there and its gradient; a height that is not finite is -inf."""

    e: list[Tensor]
    height: float
    gradient: list[Tensor]
    steepness: float  # norm of the gradient; 0 where it leads nowhere


class _Ascent(NamedTuple):
    """Loss at the start, after the first step and at the top; ||e|| there; ||g|| at the start."""

    start: float
    first: float
    top: float
    distance: float
    steepness: float


@dataclass
class _Climber:
    place: Place
    weights: Sequence[Weight]
    loss: Loss
    rho: float
    tick: Tick

    def look(self, e: list[Tensor]) -> _Point:
        self.place.move((1.0, e))
        height, gradient = loss_and_gradient(self.loss, self.weights)
        self.tick()
        steepness = norm(gradient)
        if not math.isfinite(height) or not math.isfinite(steepness):
            return _Point(e, -math.inf, gradient, 0.0)
        return _Point(e, height, gradient, steepness)

    def climb(self, e: list[Tensor], steps: int) -> _Ascent:
        """Take ``steps`` gradients uphill from e.

        A step of length eta along the gradient is projected onto the ball. It is kept if it goes
        up, and eta doubles: on the sphere a long step is one of power iteration, which is where
        the ascent converges fastest. Otherwise eta is halved. A height that is not finite counts
        as no rise.
        """
        at, eta = self.look(e), self.rho
        del e  # two points are in memory at a time, not three
        start, first, steepness = at.height, at.height, at.steepness
        for number in range(steps):
            if not at.steepness:
                break
            found = self.look(self.step(at, eta))
            if number == 0:
                first = found.height
            if found.height > at.height:
                at, eta = found, 2 * eta
            else:
                eta /= 2
            del found
        return _Ascent(start, first, at.height, norm(at.e), steepness)

    @torch.no_grad()
    def step(self, at: _Point, eta: float) -> list[Tensor]:
        """e + eta g / ||g||, projected onto the ball."""
        factor = eta / at.steepness
        e = [part + slope * factor for part, slope in zip(at.e, at.gradient, strict=True)]
        length = norm(e)
        if length > self.rho:
            for part in e:
                part.mul_(self.rho / length)
        return e


def sharpness(
    weights: Sequence[Weight],
    loss: Loss,
    rho: float,
    *,
    steps: int = 10,
    restarts: int = 0,
    seed: int = 0,
    tick: Tick = no_tick,
) -> Sharpness:
    """SAM sharpness at the weights, a lower bound that rises with ``steps`` and ``restarts``.

    The first start is e = 0, whose first step is rho g / ||g||; the others are random points of the
    sphere, and needed where the gradient is zero. The weights are bit for bit what they were
    afterwards, also after an exception. Takes the memory of about six copies of the weights.

    Args:
        weights: of the space.
        loss: see ``weights.Loss``; must be differentiable.
        rho: radius of the ball, in the weights' own units.
        steps: steps of one ascent, at least 1; each takes one gradient.
        restarts: further ascents from random points.
        seed: of these.
        tick: called after each gradient.
    """
    with differentiable(weights), displaceable(weights) as place:
        climber = _Climber(place, weights, loss, rho, tick)
        best = origin = climber.climb([torch.zeros_like(w.tensor) for w in weights], steps)
        rises = [origin.top - origin.start]
        for number in range(restarts):
            found = climber.climb(_on_sphere(weights, rho, seed, number), steps)
            rises.append(found.top - origin.start)
            best = max(best, found, key=lambda ascent: ascent.top)
    return Sharpness(
        value=best.top - origin.start,
        one_step=origin.first - origin.start,
        distance=best.distance,
        gradient_norm=origin.steepness,
        per_start=rises,
    )


def _on_sphere(weights: Sequence[Weight], rho: float, seed: int, number: int) -> list[Tensor]:
    e = [gaussian(weight, "sphere", seed, number).to(weight.tensor.dtype) for weight in weights]
    length = norm(e)
    for part in e:
        part.mul_(rho / length)
    return e
