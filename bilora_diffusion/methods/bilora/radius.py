"""A radius that sets itself, so that the auxiliary moves the loss by a given share of it.

To first order a perturbation E raises the loss by gamma = <G, E>, with G the gradient at W + E. In
factors, E = s B A and g_B = s G A^T, so gamma is the sum over layers of <g_B, B>: it is there after
the one backward pass, and it knows neither the weights' scale nor rank, depth, alpha or the loss's
unit. After each step

    rho <- rho clip(sqrt(tau mean(loss) / (rho rms(gamma / ||E||))), DOWN, UP)

with tau the wanted share. The slope gamma / ||E|| is averaged and not gamma itself, which follows
each change of rho late and so would overshoot; and its root mean square and not its mean, since a
primary that leans on the auxiliary makes it negative, which is a reason to shrink the ball, not to
widen it. The radius starts at the norm that the auxiliary has after the first step that moves it
(a warm-up's first step has rate 0 and moves nothing), and never passes a share of how far the
primary has come: where the loss is flat at first, as of a classifier that knows nothing yet, no
radius would move it by tau, and a ball that grew all the same would keep the primary from learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import adapters
from ...adapters import INITIAL, PRIMARY
from ...core.errors import UserError
from ..options import MethodOptions
from . import ball
from .auxiliary import Auxiliary, Layers, scales

RISE, RISE_BY_SAMPLE = 0.2, 0.4
"""The wanted share of one auxiliary, and of several: what is bent at one sample alone may be bent
further before the others suffer."""
DECAY = 0.98
"""Of both running means, which reach back over fifty steps: over ten, the radius swings."""
DOWN, UP = 0.9, 1.1
"""Bounds of the factor on the radius in one step."""
MOST = 0.4
"""Of the norm of the primary's change of the weights, in the measure of the radius."""
_LEAST = 1e-30
_NUMBERS = ("rho", "norm", "weight", "square", "loss")
"""Values in a checkpoint."""


def changes(layers: Layers, measures: Sequence[float]) -> list[adapters.Factors]:
    """The primary's change of each layer's weight: B A without the first values that an init took
    out of the weight, as [B, -B0] [A; A0].

    Args:
        measures: what the norms are multiplied with, as `scales` gives them for the primary.
    """
    primary = adapters.factors_of(layers, PRIMARY)
    with_initial = [pair for pair in layers if INITIAL in pair[1].lora_A]
    first = {factors.name: factors for factors in adapters.factors_of(with_initial, INITIAL)}
    return [
        factors._replace(scale=measure)
        if factors.name not in first
        else adapters.Factors(
            factors.name,
            torch.cat([factors.A, first[factors.name].A]),
            torch.cat([factors.B, -first[factors.name].B], dim=1),
            measure,
        )
        for factors, measure in zip(primary, measures, strict=True)
    ]


class AutoRadius:
    """Follows the slope of the loss along the auxiliary; all its numbers stay on the device.

    Args:
        layers: of each trained model, those that have the adapters, which are injected already.
        options: the method's.
        count: how many auxiliaries there are.

    Attributes:
        rho: the bound of Equation 10 in the coming projection; infinite before the first step.
        rise: gamma of the last step over its loss, 0-d; None before the first.
    """

    def __init__(self, layers: Sequence[Layers], options: MethodOptions, count: int) -> None:
        self.tau = options.loss_rise or (RISE if count == 1 else RISE_BY_SAMPLE)
        self.rho: float | Tensor = math.inf
        self.rise: Tensor | None = None
        self._layers = [pair for own in layers for pair in own]
        self._measures = scales(self._layers, options.rho_norm, PRIMARY)
        self._step_loss: Tensor | None = None  # of the step that is being taken, as is gamma
        self._gamma: Tensor | None = None
        self._rho: Tensor | None = None  # 0 until a step has moved the auxiliary
        self._norm: Tensor | None = None  # of the auxiliary that the coming gradient sees
        self._weight: Tensor | None = None  # of all steps so far in either mean
        self._square: Tensor | None = None  # mean of the squared slope
        self._loss: Tensor | None = None

    def observe(self, loss: Tensor) -> None:
        """Take the loss whose gradient the next step takes, 0-d."""
        self._step_loss = loss.detach()

    def before_step(self, auxiliary: Auxiliary) -> None:
        """Measure gamma, before the gradients are turned around.

        Raises:
            UserError: nobody told the loss.
        """
        if self._step_loss is None:
            raise UserError(
                'rho "auto" measures the auxiliary by the loss; call observe(loss) before each '
                "optimizer.step()."
            )
        moving = auxiliary.moving()
        self._gamma = auxiliary.rise(moving) if moving else None

    @torch.no_grad()
    def after_step(self, auxiliary: Auxiliary) -> float | Tensor:
        """Set `rho`, before the projection, and give it."""
        loss, gamma = self._step_loss, self._gamma
        self._step_loss = None  # each step tells its own
        if loss is None or gamma is None:
            return self.rho
        limit = MOST * ball.frobenius_norm(changes(self._layers, self._measures))
        if self._rho is None or self._norm is None:
            self._rho, self._norm = torch.zeros_like(limit), torch.zeros_like(limit)
        loss, gamma, limit = loss.to(self._rho), gamma.to(self._rho), limit.to(self._rho)
        # Those that the gradient saw may be others than those that were projected last.
        seen = auxiliary.seen_norm()
        norm = self._norm if seen is None else seen.to(self._rho)
        share = torch.where(norm > 0, 1 - DECAY, 0.0).to(self._rho)  # a zero one says nothing
        slope = gamma / norm.clamp_min(_LEAST)
        self._weight = self._mean(self._weight, torch.ones_like(loss), share)
        self._square = self._mean(self._square, slope * slope, share)
        self._loss = self._mean(self._loss, loss, share)
        self.rise = gamma / loss
        # loss / weight over the root of square / weight
        expected = self._rho * (self._square * self._weight).sqrt()
        ratio = (self.tau * self._loss / expected.clamp_min(_LEAST)).clamp_min(0).sqrt()
        ratio = torch.where(self._weight > 0, ratio, 1.0)
        self._rho = torch.minimum(self._rho * ratio.clamp(DOWN, UP), limit)
        # While the auxiliary has not moved there is no radius to multiply, only its limit.
        self.rho = torch.where(self._rho > 0, self._rho, limit)
        return self.rho

    def projected(self, norm: Tensor) -> None:
        """Take the auxiliary's norm, 0-d, once it was clipped to `rho`."""
        self._norm = norm
        if self._rho is not None:
            self._rho = torch.where(self._rho > 0, self._rho, norm)

    def metrics(self) -> dict[str, float]:
        """The radius and the rise; waits for the device."""
        values = {"rho": self._rho, "loss_rise": self.rise}
        return {name: float(value) for name, value in values.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """All numbers, to the bit."""
        values = {name: getattr(self, f"_{name}") for name in _NUMBERS}
        return {"radius": {name: None if v is None else float(v) for name, v in values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        device = adapters.weights(self._layers[0][1], PRIMARY)[0].device
        for name, value in state["radius"].items():
            number = None if value is None else torch.tensor(value, dtype=ball.wide(device))
            setattr(self, f"_{name}", None if number is None else number.to(device))
        self.rho = math.inf if self._rho is None else self._rho

    @staticmethod
    def _mean(mean: Tensor | None, value: Tensor, share: Tensor) -> Tensor:
        return share * value + (0 if mean is None else (1 - share) * mean)
