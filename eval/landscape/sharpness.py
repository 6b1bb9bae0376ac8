"""SAM sharpness of a minimum,

    max over ||e|| <= rho of L(w + e) - L(w)

(Foret et al. 2021, https://arxiv.org/abs/2010.01412, Eq. 1; the paper, Eq. 2) by projected gradient
ascent, one norm over all weights of the space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .weights import Loss, Weight, differentiable, displaceable, loss_and_gradient, norm


class _Point(NamedTuple):
    """A displacement, the loss there and its gradient; a height that is not finite is -inf."""

    e: list[Tensor]
    height: float
    gradient: list[Tensor]
    steepness: float  # norm of the gradient; 0 where it leads nowhere


def sharpness(weights: Sequence[Weight], loss: Loss, rho: float, steps: int = 10) -> float:
    """SAM sharpness at the weights, a lower bound that rises with ``steps``; at least 0.

    The first step is SAM's own perturbation, rho g / ||g||. A step of length eta along the gradient
    is projected onto the ball. It is kept if it goes up, and eta doubles: on the sphere a long step
    is one of power iteration, which is where the ascent converges fastest. Otherwise eta is halved.
    A height that is not finite counts as no rise. The weights are bit for bit what they were
    afterwards, also after an exception. Takes the memory of about six copies of the weights.
    """
    with differentiable(weights), displaceable(weights) as move:

        def look(e: list[Tensor]) -> _Point:
            move((1.0, e))
            height, gradient = loss_and_gradient(loss, weights)
            steepness = norm(gradient)
            if not math.isfinite(height) or not math.isfinite(steepness):
                return _Point(e, -math.inf, gradient, 0.0)
            return _Point(e, height, gradient, steepness)

        at, eta = look([torch.zeros_like(weight.tensor) for weight in weights]), rho
        start = at.height
        for _ in range(steps):
            if not at.steepness:
                break
            candidate = look(_step(at, eta, rho))
            if candidate.height > at.height:
                at, eta = candidate, 2 * eta
            else:
                eta /= 2
            del candidate  # two points are in memory at a time, not three
        return at.height - start


@torch.no_grad()
def _step(at: _Point, eta: float, rho: float) -> list[Tensor]:
    """e + eta g / ||g||, projected onto the ball."""
    factor = eta / at.steepness
    e = [part + slope * factor for part, slope in zip(at.e, at.gradient, strict=True)]
    length = norm(e)
    if length > rho:
        for part in e:
            part.mul_(rho / length)
    return e
