"""A radius that sets itself, so that the auxiliary moves the loss by a given share of it.

To first order a perturbation E raises the loss by gamma = <G, E>, with G the gradient at W + E. In
factors, E = s B A and g_B = s G A^T, so gamma is the sum over layers of <g_B, B>: it is there after
the one backward pass, and it knows neither the weights' scale nor rank, depth, alpha or the loss's
unit. After each step

    rho <- rho clip(sqrt(tau mean(loss) / (rho rms(gamma / ||E||))), DOWN, UP)

with tau the share of the loss that is asked for. The slope gamma / ||E|| is averaged, not gamma:
gamma follows each change of rho late and so would overshoot. It is averaged as a root mean square,
not as a mean: a primary that leans on the auxiliary makes it negative, which is a reason to shrink
the ball, not to widen it. The radius starts at the norm that the auxiliary has after the first step
that moves it (a warm-up's first step has rate 0 and moves nothing). It never passes a share of how
far the primary has come: where the loss is flat at first, as of a classifier that knows nothing
yet, no radius would move it by tau, and a ball that grew all the same would keep the primary from
learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ... import adapters
from ...adapters import INITIAL, PRIMARY
from ...core.errors import UserError
from ..options import MethodOptions
from . import ball
from .auxiliary import Auxiliary, Layers, norm_scales

RISE, RISE_BY_SAMPLE = 0.2, 0.4
"""Share of the loss asked for of one auxiliary, and of several: what is bent at one sample alone
may be bent further before the others suffer."""
DECAY = 0.98
"""Of both running means, which reach back over fifty steps: over ten, the radius swings."""
DOWN, UP = 0.9, 1.1
"""Bounds of the factor on the radius in one step."""
LARGEST_SHARE = 0.4
"""Largest radius, as a share of the norm of the primary's change of the weights."""
_SMALLEST = 1e-30  # instead of a zero in a denominator
_STATE_NAMES = ("rho", "norm", "weight", "square", "loss")
"""Numbers in a checkpoint, by their names there; attributes of these names with "_" before them."""


def weight_changes(layers: Layers, scales: Sequence[float]) -> list[adapters.Factors]:
    """The primary's change of each layer's weight, as factors B A.

    First values that an init took out of the weight do not count: B A - B0 A0 is [B, -B0] [A; A0].

    Args:
        layers: layers with the primary.
        scales: factor on the norm of each (`norm_scales`).
    """
    with_initial = [pair for pair in layers if INITIAL in pair[1].lora_A]
    initial = {layer.name: layer for layer in adapters.factors_of(with_initial, INITIAL)}
    changes = []
    for layer, scale in zip(adapters.factors_of(layers, PRIMARY), scales, strict=True):
        A, B = layer.A, layer.B
        if layer.name in initial:
            first = initial[layer.name]
            A, B = torch.cat([A, first.A]), torch.cat([B, -first.B], dim=1)
        changes.append(adapters.Factors(layer.name, A, B, scale))
    return changes


class AutoRadius:
    """Follows the slope of the loss along the auxiliary; all its numbers stay on the device.

    Args:
        layers: of each trained model, those that have the adapters, which are injected already.
        options: the method's.
        count: number of auxiliaries.

    Attributes:
        rho: the bound of Equation 10 in the coming projection; infinite before the first step.
        rise: gamma of the last step over its loss, 0-d; None before the first.
    """

    def __init__(self, layers: Sequence[Layers], options: MethodOptions, count: int) -> None:
        self.tau = options.loss_rise or (RISE if count == 1 else RISE_BY_SAMPLE)
        self.rho: float | Tensor = math.inf
        self.rise: Tensor | None = None
        self._layers = list(chain.from_iterable(layers))
        self._scales = norm_scales(self._layers, options.rho_norm, PRIMARY)
        self._step_loss: Tensor | None = None  # of the step that is being taken, as is gamma
        self._gamma: Tensor | None = None
        self._rho: Tensor | None = None  # 0 until a step has moved the auxiliary
        self._norm: Tensor | None = None  # of the auxiliary that the coming gradient sees
        self._weight: Tensor | None = None  # of all steps so far in either mean
        self._square: Tensor | None = None  # running mean of the squared slope
        self._loss: Tensor | None = None  # running mean of the loss

    def observe(self, loss: Tensor) -> None:
        """Take the loss whose gradient the next step takes, 0-d."""
        self._step_loss = loss.detach()

    def before_step(self, auxiliary: Auxiliary) -> None:
        """Measure gamma, before the signs of the gradients are changed.

        Raises:
            UserError: `observe` was not called.
        """
        if self._step_loss is None:
            raise UserError(
                'rho "auto" measures the auxiliary by the loss; call observe(loss) before each '
                "optimizer.step()."
            )
        active = auxiliary.active()
        self._gamma = auxiliary.loss_rise(active) if active else None

    @torch.no_grad()
    def after_step(self, auxiliary: Auxiliary) -> float | Tensor:
        """Set `rho`, before the projection, and return it."""
        loss, gamma = self._step_loss, self._gamma
        self._step_loss = None  # each step has to be told its own
        if loss is None or gamma is None:
            return self.rho
        changes = weight_changes(self._layers, self._scales)
        limit = LARGEST_SHARE * ball.frobenius_norm(changes)
        if self._rho is None or self._norm is None:
            self._rho, self._norm = torch.zeros_like(limit), torch.zeros_like(limit)
        loss, gamma, limit = loss.to(self._rho), gamma.to(self._rho), limit.to(self._rho)
        self.rise = gamma / loss

        # The auxiliaries that the gradient saw may be others than those projected last.
        active_norm = auxiliary.active_norm()
        norm = self._norm if active_norm is None else active_norm.to(self._rho)
        slope = gamma / norm.clamp_min(_SMALLEST)
        # A zero auxiliary says nothing about the slope, so its step has no share in the means.
        share = torch.where(norm > 0, 1 - DECAY, 0.0).to(self._rho)
        self._weight = _running_mean(self._weight, torch.ones_like(loss), share)
        self._square = _running_mean(self._square, slope * slope, share)
        self._loss = _running_mean(self._loss, loss, share)

        # tau mean(loss) / (rho rms(slope)) with mean(loss) = loss / weight and rms(slope) =
        # sqrt(square / weight), so one sqrt(weight) is left in the denominator.
        expected = self._rho * (self._square * self._weight).sqrt()
        ratio = (self.tau * self._loss / expected.clamp_min(_SMALLEST)).clamp_min(0).sqrt()
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
        numbers: dict[str, float | None] = {}
        for name in _STATE_NAMES:
            value = getattr(self, f"_{name}")
            numbers[name] = None if value is None else float(value)
        return {"radius": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        device = adapters.weights(self._layers[0][1], PRIMARY)[0].device
        for name, value in state["radius"].items():
            number = None
            if value is not None:
                number = torch.tensor(value, dtype=ball.wide(device)).to(device)
            setattr(self, f"_{name}", number)
        self.rho = math.inf if self._rho is None else self._rho


def _running_mean(mean: Tensor | None, value: Tensor, share: Tensor) -> Tensor:
    """The mean with a new value at this share; not divided by the sum of all shares."""
    return share * value + (0 if mean is None else (1 - share) * mean)
