"""LoRA-LookSAM: SAM's second gradient every k steps; in between what it added is used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import PRIMARY
from . import perturb
from .base import Counting, StepOptimizer
from .lora_sam import LoRASAM
from .options import LookSAMOptions
from .registry import register

DIRECTION = "direction"


@register("lora-looksam")
class LoRALookSAM(LoRASAM, Counting):
    """LoRA-SAM at steps 1, k + 1, 2 k + 1, ...; at the others, with g the gradient of the step,

        g + alpha ||g|| / ||g_v|| g_v,    g_v = g_s - <g_s, g> / ||g||^2 g

    where g_v was left by the last step of SAM, from its two gradients g and g_s: the part of g_s
    that leads to flatter places, which changes slowly. Norms and products run over the factors of
    all layers and targets. A step costs 1 + 1 / k passes on average. Clipping sees what the
    optimizer gets; `sharpness` is logged at the steps of SAM. g_v is in checkpoints.

    Source: https://arxiv.org/abs/2203.02714, Algorithm 1, which uses k = 5 and alpha = 0.7, on
    LoRA's parameters; rho is LoRA-SAM's.
    """

    title = "LoRA-LookSAM"
    summary = (
        "Trained with LookSAM on the adapter: SAM's gradient every few steps, and its part across "
        "the plain gradient used again in between."
    )

    own_options = LookSAMOptions
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType(
        {"rho": 1e-30, "own": LookSAMOptions(looksam_alpha=0.0)}
    )

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        looks = self.taken % self.own.looksam_k == 0
        self.taken += 1
        loss = forward_backward()
        if looks:
            self._rise = loss, self._look(forward_backward, optimizer)
        else:
            self._rise = None
            self._reuse()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self._g_v}

    def _look(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """A step of SAM from the gradients that are there; returns the loss uphill."""
        weights = list(self._named.values())
        g = _gradients(weights)
        with perturb.restored(weights):
            perturb.move_(weights, g, self.rho)
            optimizer.zero_grad()
            perturbed = forward_backward()
        across = orthogonal(_gradients(weights), g)
        torch._foreach_copy_(list(self._g_v.values()), across)
        return perturbed

    def _reuse(self) -> None:
        pairs = zip(self._named.values(), self._g_v.values(), strict=True)
        moved = [(w.grad, direction) for w, direction in pairs if w.grad is not None]
        g = [gradient for gradient, _ in moved]
        length = self.own.looksam_alpha * perturb.norm(g)
        perturb.move_(g, [direction for _, direction in moved], length)

    @cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return {
            f"{target.name}/{DIRECTION}/{name}": weight
            for target in self.targets
            for own in (adapters.named_parameters, adapters.whole)
            for name, weight in own(target.model, PRIMARY).items()
        }

    @cached_property
    def _g_v(self) -> dict[str, Tensor]:
        """g_v by name, zero before the first step."""
        return {n: torch.zeros_like(w, requires_grad=False) for n, w in self._named.items()}


def _gradients(weights: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the gradients, zero where there is none."""
    return [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]


@torch.no_grad()
def orthogonal(vectors: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """v - <v, g> / ||g||^2 g, over all tensors together; v itself where g is zero.

    Args:
        vectors: v, changed in place.
        along: g, of the same shapes.
    """
    square = perturb.dot(along, along)
    share = torch.where(square > 0, perturb.dot(vectors, along) / square, 0.0)
    taken = torch._foreach_mul(along, [share.to(g.device, g.dtype) for g in along])
    torch._foreach_sub_(vectors, taken)
    return vectors
