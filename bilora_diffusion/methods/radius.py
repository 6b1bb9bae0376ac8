"""A radius that sets itself, so that the auxiliary moves the loss by a given share of it.

To first order a perturbation E raises the loss by gamma = <G, E>, with G the gradient at W + E. In
factors, E = s B A and g_B = s G A^T, so gamma is the sum over layers of <g_B, B>: it is there after
the one backward pass, and it knows neither the weights' scale nor rank, depth, alpha or the loss's
unit. After each step

    rho <- rho clip(sqrt(tau mean(loss) / (rho rms(gamma / ||E||))), DOWN, UP)

with tau the wanted share. The slope gamma / ||E|| is averaged and not gamma itself, which follows
each change of rho late and so would overshoot; and its root mean square and not its mean, since a
primary that leans on the auxiliary makes it negative, which is a reason to shrink the ball, not to
widen it. The radius starts at the norm that the auxiliary has after its first step, and never
passes a share of how far the primary has come: where the loss is flat at first, as of a classifier
that knows nothing yet, no radius would move it by tau, and a ball that grew all the same would keep
the primary from learning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import adapters
from ..adapters import AUXILIARY, INITIAL, PRIMARY
from ..errors import UserError
from .ball import wide

RISE, RISE_BY_SAMPLE = 0.2, 0.4
"""The wanted share of one auxiliary, and of several: what is bent at one sample alone may be bent
further before the others suffer."""
DECAY = 0.98
"""Of both running means, which reach back over fifty steps: over ten, the radius swings."""
DOWN, UP = 0.9, 1.1
"""What the radius is multiplied with in one step lies between them."""
MOST = 0.4
"""Of the norm of the primary's change of the weights, in the measure of the radius."""
_LEAST = 1e-30


def scales(
    layers: Sequence[tuple[str, adapters.LoraLayer]], rho_norm: str, adapter: str = AUXILIARY
) -> list[float]:
    """What the norm of each layer's B A is multiplied with: s, 1 ("unscaled") or s / ||W||_F
    ("relative", in which rescaling a layer's weights changes nothing).
    """
    if rho_norm == "unscaled":
        return [1.0] * len(layers)
    scaled = [float(layer.scaling[adapter]) for _, layer in layers]
    if rho_norm == "scaled":
        return scaled
    norms = [adapters.weight_norm(layer) for _, layer in layers]
    for (name, _), norm in zip(layers, norms, strict=True):
        if norm == 0:
            raise UserError(
                f'The weight of {name} is zero, so nothing is relative to it; use "scaled".'
            )
    return [s / norm for s, norm in zip(scaled, norms, strict=True)]


def changes(
    layers: Sequence[tuple[str, adapters.LoraLayer]], measures: Sequence[float]
) -> list[adapters.Factors]:
    """How the primary changes each layer's weight: B A, without the first values that an init took
    out of the weight, as [B, -B0] [A; A0].

    Args:
        measures: what the norms are multiplied with, as `scales` gives them for the primary.
    """
    own = adapters.factors_of(layers, PRIMARY)
    held = [pair for pair in layers if INITIAL in pair[1].lora_A]
    first = {factors.name: factors for factors in adapters.factors_of(held, INITIAL)}
    return [
        factors._replace(scale=measure)
        if factors.name not in first
        else adapters.Factors(
            factors.name,
            torch.cat([factors.A, first[factors.name].A]),
            torch.cat([factors.B, -first[factors.name].B], dim=1),
            measure,
        )
        for factors, measure in zip(own, measures, strict=True)
    ]


class AutoRadius:
    """Follows the slope of the loss along the auxiliary; all its numbers stay on the device.

    Args:
        tau: the share of the loss by which the auxiliary is to move it.

    Attributes:
        rho: the radius, 0-d; None before the first step.
        rise: gamma of the last step over its loss, 0-d; None before the second.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self.rho: Tensor | None = None
        self.rise: Tensor | None = None
        self._norm: Tensor | None = None  # of the auxiliary that the coming gradient sees
        self._weight: Tensor | None = None  # of all steps so far in either mean
        self._square: Tensor | None = None  # mean of the squared slope
        self._loss: Tensor | None = None

    @torch.no_grad()
    def update(
        self, loss: Tensor, gamma: Tensor, moved: Tensor, norm: Tensor | None = None
    ) -> Tensor:
        """Set the radius after one more step, and give it.

        Args:
            loss: of the step, 0-d.
            gamma: <G, E> of the step, before its update, 0-d.
            moved: norm of the primary's change of the weights after the step, 0-d.
            norm: of the auxiliaries that the step's gradient saw, 0-d, where these are others than
                those that were projected last. A step that saw none yet says nothing.
        """
        most = MOST * moved
        if self.rho is None or self._norm is None:
            return most  # the auxiliary was zero in the first step
        loss, gamma = loss.to(self.rho), gamma.to(self.rho)
        norm = self._norm if norm is None else norm.to(self.rho)
        share = torch.where(norm > 0, 1 - DECAY, 0.0).to(self.rho)
        slope = gamma / norm.clamp_min(_LEAST)
        self._weight = self._mean(self._weight, torch.ones_like(loss), share)
        self._square = self._mean(self._square, slope * slope, share)
        self._loss = self._mean(self._loss, loss, share)
        self.rise = gamma / loss
        # loss / weight over the root of square / weight
        expected = self.rho * (self._square * self._weight).sqrt()
        ratio = (self.tau * self._loss / expected.clamp_min(_LEAST)).clamp_min(0).sqrt()
        ratio = torch.where(self._weight > 0, ratio, 1.0)
        self.rho = torch.minimum(self.rho * ratio.clamp(DOWN, UP), most.to(self.rho))
        return self.rho

    def projected(self, norm: Tensor) -> None:
        """Tell the auxiliary's norm, 0-d, once it was clipped to what `update` gave."""
        self._norm = norm
        if self.rho is None:
            self.rho = norm

    def metrics(self) -> dict[str, float]:
        """The radius and the rise, for the log; waits for the device."""
        values = {"rho": self.rho, "loss_rise": self.rise}
        return {name: float(value) for name, value in values.items() if value is not None}

    def state_dict(self) -> dict[str, float | None]:
        """What a resume needs, to the bit."""
        return {name: None if v is None else float(v) for name, v in self._numbers().items()}

    def load_state_dict(self, state: dict[str, float | None], device: torch.device) -> None:
        """Take back what `state_dict` gave."""
        for name in self._numbers():
            value = state[name]
            kept = None if value is None else torch.tensor(value, dtype=wide(device), device=device)
            setattr(self, name if name == "rho" else f"_{name}", kept)

    def _numbers(self) -> dict[str, Tensor | None]:
        return {
            "rho": self.rho,
            "norm": self._norm,
            "weight": self._weight,
            "square": self._square,
            "loss": self._loss,
        }

    @staticmethod
    def _mean(mean: Tensor | None, value: Tensor, share: Tensor) -> Tensor:
        return share * value + (0 if mean is None else (1 - share) * mean)
