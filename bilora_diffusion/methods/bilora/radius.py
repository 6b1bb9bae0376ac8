"""A radius that sets itself, so that the auxiliary moves the loss by a given share of it.

Three quantities, with G the gradient of the loss at W + E:

    gain     <G, E>, the ascent gain, by which the perturbation E raises the loss to first order
    slope    gain / ||E||
    rise     gain / loss, which is logged as ``loss_rise``; ``--loss_rise`` is its target

In factors, E = s B A and g_B = s G A^T, so the gain is the sum over layers of <g_B, B>. It is known
after the one backward pass, and does not depend on the weights' scale, rank, depth, alpha or the
unit of the loss. After each step

    rho <- min(rho clip(sqrt(target rise * mean(loss) / (rho rms(slope))), DOWN, UP), limit)

The slope is averaged, not the gain: the gain follows each change of rho with a delay, so that the
radius would overshoot.
The average is a root mean square, not a mean: a primary that relies on the auxiliary makes the
slope negative, which is a reason to shrink the ball, not to widen it.

The radius starts at the norm of the auxiliary after the first step that moves it (a warm-up's first
step has rate 0 and moves nothing). The limit is a share of the norm of the primary's change. Where
the loss is flat at first, as that of an untrained classifier, no radius would reach the target, and
a growing ball would keep the primary from learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
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

# Default target of one auxiliary's rise.
TARGET_RISE = 0.2
# The same for several auxiliaries: one that a single sample sees may move that sample's loss
# further before others suffer.
SAMPLE_TARGET_RISE = 0.4
# Decay of both running means, which cover about 50 steps: with 10, the radius oscillates.
DECAY = 0.98
# Bounds of the factor on the radius in one step.
DOWN = 0.9
UP = 1.1
# Largest radius, as a share of the norm of the primary's change of the weights.
MAX_SHARE = 0.4
_SMALLEST = 1e-30  # in place of a zero in a denominator


def weight_changes(layers: Layers, scales: Sequence[float]) -> list[adapters.Factors]:
    """The primary's change of each layer's weight, as factors B A.

    First values that an init took out of the weight do not count. The change is written as
    B A - B0 A0 = [B - B0, B0] [A; A - A0], whose factors are as small as itself: the norm of
    [B, -B0] [A; A0] would be lost in rounding at the first steps of a long warm-up, and a limit of
    0 would set the auxiliary to 0 for ever.

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
            A = torch.cat([A, A - initial.A])
            B = torch.cat([B - initial.B, initial.B], dim=1)
        changes.append(adapters.Factors(factors.name, A, B, scale))
    return changes


@dataclass
class RadiusState:
    """The numbers that the coming steps depend on, 0-d; a checkpoint holds them by these names.

    The running means start at 0, so each is to be divided by `weight`, as Adam's moments are by
    1 - beta^t.

    Attributes:
        rho: the radius; 0 until a step has moved the auxiliary.
        norm: norm of the auxiliary that the coming gradient sees.
        weight: sum of the shares of all steps in either mean.
        square: running mean of the squared slope.
        loss: running mean of the loss.
    """

    rho: Tensor
    norm: Tensor
    weight: Tensor
    square: Tensor
    loss: Tensor


class AutoRadius:
    """A radius that follows the slope of the loss along the auxiliary.

    All of its numbers stay on the device.

    Args:
        layers: of each trained model, the layers that have the adapters.
        options: options of the method.
        count: number of auxiliaries.

    Attributes:
        target_rise: share of the loss by which the auxiliary is to move it.
        rise: rise of the last step, 0-d; None before the first.
        bound: radius of the coming projection (Equation 10); infinite before the first step.
        state: numbers that the coming steps depend on; None before the first step.
    """

    def __init__(self, layers: Sequence[Layers], options: MethodOptions, count: int) -> None:
        default_target = TARGET_RISE if count == 1 else SAMPLE_TARGET_RISE
        self.target_rise = options.loss_rise or default_target
        self.rise: Tensor | None = None
        self.bound: float | Tensor = math.inf
        self.state: RadiusState | None = None
        self._layers = list(chain.from_iterable(layers))
        self._scales = norm_scales(self._layers, options.rho_norm, PRIMARY)
        # Of the step that is being taken.
        self._loss: Tensor | None = None
        self._gain: Tensor | None = None

    def observe(self, loss: Tensor) -> None:
        """Take the loss of the coming step, 0-d."""
        self._loss = loss.detach()

    def before_step(self, auxiliary: Auxiliary) -> None:
        """Measure the gain, before the signs of the gradients are changed.

        Raises:
            UserError: `observe` was not called.
        """
        if self._loss is None:
            raise UserError(
                'rho "auto" measures the auxiliary by the loss; call observe(loss) before each '
                "optimizer.step()."
            )
        active = auxiliary.active()
        self._gain = auxiliary.ascent_gain(active) if active else None

    @torch.no_grad()
    def after_step(self, auxiliary: Auxiliary) -> float | Tensor:
        """Set `bound` for the coming projection, and return it."""
        loss = self._loss
        gain = self._gain
        self._loss = None  # so that a step without `observe` is noticed
        if loss is None or gain is None:
            return self.bound
        changes = weight_changes(self._layers, self._scales)
        limit = MAX_SHARE * ball.frobenius_norm(changes)
        if self.state is None:
            zero = torch.zeros_like(limit)
            self.state = RadiusState(rho=zero, norm=zero, weight=zero, square=zero, loss=zero)
        state = self.state
        loss = loss.to(state.rho)
        gain = gain.to(state.rho)
        limit = limit.to(state.rho)
        self.rise = gain / loss

        # The auxiliaries that the gradient saw may be others than those that were projected last.
        norm = state.norm
        active_norm = auxiliary.active_norm()
        if active_norm is not None:
            norm = active_norm.to(state.rho)
        slope = gain / norm.clamp_min(_SMALLEST)
        # A zero auxiliary has no slope, so its step has no weight in the means.
        step_weight = torch.where(norm > 0, 1 - DECAY, 0.0).to(state.rho)
        state.weight = step_weight + (1 - step_weight) * state.weight
        state.square = step_weight * (slope * slope) + (1 - step_weight) * state.square
        state.loss = step_weight * loss + (1 - step_weight) * state.loss

        # The target gain over the expected one, target_rise mean(loss) / (rho rms(slope)), with
        # mean(loss) = loss / weight and rms(slope) = sqrt(square / weight). Both are multiplied by
        # weight, which is 0 at first.
        weighted_target = self.target_rise * state.loss
        weighted_gain = state.rho * (state.square * state.weight).sqrt()
        ratio = (weighted_target / weighted_gain.clamp_min(_SMALLEST)).clamp_min(0).sqrt()
        ratio = torch.where(state.weight > 0, ratio, 1.0)
        state.rho = torch.minimum(state.rho * ratio.clamp(DOWN, UP), limit)
        # While the auxiliary has not moved there is no radius to multiply, only the limit.
        self.bound = torch.where(state.rho > 0, state.rho, limit)
        return self.bound

    def after_projection(self, norm: Tensor) -> None:
        """Take the auxiliary's norm after the projection onto `bound`, 0-d."""
        if self.state is not None:
            self.state.norm = norm
            # The radius starts at the norm after the first step that moves the auxiliary.
            self.state.rho = torch.where(self.state.rho > 0, self.state.rho, norm)

    def metrics(self) -> dict[str, float]:
        """The radius and the rise, read from the device; {} before the first step."""
        metrics: dict[str, float] = {}
        if self.state is not None:
            metrics["rho"] = float(self.state.rho)
        if self.rise is not None:
            metrics["loss_rise"] = float(self.rise)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """`state` to the bit, with None for each number before the first step."""
        numbers: dict[str, float | None] = {}
        for field in fields(RadiusState):
            numbers[field.name] = None
            if self.state is not None:
                numbers[field.name] = float(getattr(self.state, field.name))
        return {"radius": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        _path, layer = self._layers[0]
        device = adapters.weights(layer, PRIMARY)[0].device
        dtype = ball.wide_dtype(device)
        numbers: dict[str, Tensor] = {}
        for name, value in state["radius"].items():
            if value is not None:
                numbers[name] = torch.tensor(value, dtype=dtype).to(device)
        self.state = RadiusState(**numbers) if numbers else None
        self.bound = math.inf if self.state is None else self.state.rho
