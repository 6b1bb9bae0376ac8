"""A radius that sets itself, so that the auxiliary moves the loss by a given share of it.

To first order a perturbation E raises the loss by gamma = <G, E>, with G the gradient at W + E. In
factors, E = s B A and g_B = s G A^T, so gamma is the sum over layers of <g_B, B>. It is known after
the one backward pass, and does not depend on the weights' scale, rank, depth, alpha or the unit of
the loss. After each step

    rho <- rho clip(sqrt(tau mean(loss) / (rho rms(gamma / ||E||))), DOWN, UP)

with tau the share of the loss by which the auxiliary is to move it.

The slope gamma / ||E|| is averaged, not gamma, which follows each change of rho late and so would
overshoot. The average is a root mean square, not a mean: a primary that relies on the auxiliary
makes the slope negative, which is a reason to shrink the ball, not to widen it.

The radius starts at the norm of the auxiliary after the first step that moves it (a warm-up's first
step has rate 0 and moves nothing). It is at most a share of the norm of the primary's change. Where
the loss is flat at first, as that of an untrained classifier, no radius would move it by tau, and a
growing ball would keep the primary from learning.
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

RISE = 0.2
"""Default share of the loss by which one auxiliary is to move it."""
RISE_BY_SAMPLE = 0.4
"""The same for several auxiliaries: one that a single sample sees may move that sample's loss
further before others suffer."""
DECAY = 0.98
"""Decay of both running means, which cover about 50 steps: with 10, the radius oscillates."""
DOWN = 0.9
UP = 1.1
"""With `DOWN`, the bounds of the factor on the radius in one step."""
LARGEST_SHARE = 0.4
"""Largest radius, as a share of the norm of the primary's change of the weights."""
_SMALLEST = 1e-30
"""It replaces a zero in a denominator."""
_STATE_NAMES = ("rho", "norm", "weight", "square", "loss")
"""Numbers in a checkpoint, by their names there; the attributes have "_" before them."""


def weight_changes(layers: Layers, scales: Sequence[float]) -> list[adapters.Factors]:
    """The primary's change of each layer's weight, as factors B A.

    First values that an init took out of the weight do not count: B A - B0 A0 is [B, -B0] [A; A0].

    Args:
        layers: layers with the primary.
        scales: factor on the norm of each layer's change (`norm_scales`).
    """
    changes: list[adapters.Factors] = []
    primary_factors = adapters.factors_of(layers, PRIMARY)
    for named_layer, factors, scale in zip(layers, primary_factors, scales, strict=True):
        A = factors.A
        B = factors.B
        _path, layer = named_layer
        if INITIAL in layer.lora_A:
            (initial,) = adapters.factors_of([named_layer], INITIAL)
            A = torch.cat([A, initial.A])
            B = torch.cat([B, -initial.B], dim=1)
        changes.append(adapters.Factors(factors.name, A, B, scale))
    return changes


class AutoRadius:
    """A radius that follows the slope of the loss along the auxiliary.

    All of its numbers stay on the device.

    Args:
        layers: of each trained model, the layers that have the adapters.
        options: options of the method.
        count: number of auxiliaries.

    Attributes:
        tau: share of the loss by which the auxiliary is to move it.
        rho: the bound of Equation 10 in the coming projection; infinite before the first step.
        rise: gamma of the last step over its loss, 0-d; None before the first.
    """

    def __init__(self, layers: Sequence[Layers], options: MethodOptions, count: int) -> None:
        default_rise = RISE if count == 1 else RISE_BY_SAMPLE
        self.tau = options.loss_rise or default_rise
        self.rho: float | Tensor = math.inf
        self.rise: Tensor | None = None
        self._layers = list(chain.from_iterable(layers))
        self._scales = norm_scales(self._layers, options.rho_norm, PRIMARY)
        # Loss and gamma of the step that is being taken.
        self._step_loss: Tensor | None = None
        self._gamma: Tensor | None = None
        self._rho: Tensor | None = None  # 0 until a step has moved the auxiliary
        self._norm: Tensor | None = None  # norm of the auxiliary that the coming gradient sees
        self._weight: Tensor | None = None  # sum of the shares of all steps in either mean
        self._square: Tensor | None = None  # running mean of the squared slope
        self._loss: Tensor | None = None  # running mean of the loss

    def observe(self, loss: Tensor) -> None:
        """Take the loss of the coming step, 0-d."""
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
        self._gamma = None
        active = auxiliary.active()
        if active:
            self._gamma = auxiliary.loss_rise(active)

    @torch.no_grad()
    def after_step(self, auxiliary: Auxiliary) -> float | Tensor:
        """Set `rho`, before the projection, and return it."""
        loss = self._step_loss
        gamma = self._gamma
        self._step_loss = None  # so that a step without `observe` is noticed
        if loss is None or gamma is None:
            return self.rho
        changes = weight_changes(self._layers, self._scales)
        limit = LARGEST_SHARE * ball.frobenius_norm(changes)
        if self._rho is None or self._norm is None:
            self._rho = torch.zeros_like(limit)
            self._norm = torch.zeros_like(limit)
        loss = loss.to(self._rho)
        gamma = gamma.to(self._rho)
        limit = limit.to(self._rho)
        self.rise = gamma / loss

        # The auxiliaries that the gradient saw may be others than those that were projected last.
        norm = self._norm
        active_norm = auxiliary.active_norm()
        if active_norm is not None:
            norm = active_norm.to(self._rho)
        slope = gamma / norm.clamp_min(_SMALLEST)
        # A zero auxiliary has no slope, so its step has no share in the means.
        share = torch.where(norm > 0, 1 - DECAY, 0.0).to(self._rho)
        self._weight = _running_mean(self._weight, torch.ones_like(loss), share)
        self._square = _running_mean(self._square, slope * slope, share)
        self._loss = _running_mean(self._loss, loss, share)

        # tau mean(loss) / (rho rms(slope)), where mean(loss) = loss / weight and rms(slope) =
        # sqrt(square / weight), so that sqrt(weight) is left in the denominator.
        expected = self._rho * (self._square * self._weight).sqrt()
        ratio = (self.tau * self._loss / expected.clamp_min(_SMALLEST)).clamp_min(0).sqrt()
        ratio = torch.where(self._weight > 0, ratio, 1.0)
        self._rho = torch.minimum(self._rho * ratio.clamp(DOWN, UP), limit)
        # While the auxiliary has not moved there is no radius to multiply, only the limit.
        self.rho = torch.where(self._rho > 0, self._rho, limit)
        return self.rho

    def projected(self, norm: Tensor) -> None:
        """Take the auxiliary's norm after the projection onto `rho`, 0-d."""
        self._norm = norm
        if self._rho is not None:
            self._rho = torch.where(self._rho > 0, self._rho, norm)

    def metrics(self) -> dict[str, float]:
        """The radius and the rise, read from the device; those that there are."""
        metrics: dict[str, float] = {}
        if self._rho is not None:
            metrics["rho"] = float(self._rho)
        if self.rise is not None:
            metrics["loss_rise"] = float(self.rise)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All numbers that the coming steps depend on, to the bit."""
        numbers: dict[str, float | None] = {}
        for name in _STATE_NAMES:
            value: Tensor | None = getattr(self, f"_{name}")
            numbers[name] = None if value is None else float(value)
        return {"radius": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        _path, layer = self._layers[0]
        device = adapters.weights(layer, PRIMARY)[0].device
        for name, value in state["radius"].items():
            number = None
            if value is not None:
                number = torch.tensor(value, dtype=ball.wide_dtype(device)).to(device)
            setattr(self, f"_{name}", number)
        self.rho = math.inf if self._rho is None else self._rho


def _running_mean(mean: Tensor | None, value: Tensor, share: Tensor) -> Tensor:
    """The mean with a new value of this share; it is not divided by the sum of all shares."""
    if mean is None:
        return share * value
    return share * value + (1 - share) * mean
