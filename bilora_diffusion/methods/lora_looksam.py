"""LoRA-LookSAM: SAM's second gradient every k steps; in between what it added is used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import PRIMARY
from . import LookSAMOptions, perturb
from .base import Counting, MethodOptions, StepOptimizer
from .lora_sam import LoRASAM
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

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._weights: dict[str, nn.Parameter] = {}
        self._directions: dict[str, Tensor] = {}

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
        return {**super().tensors(), **self._g_v()}

    def _look(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """A step of SAM from the gradients that are there; returns the loss uphill."""
        directions = self._g_v()
        weights = list(self._weights.values())
        g = _gradients(weights)
        with perturb.restored(weights):
            perturb.move_(weights, g, self.rho)
            optimizer.zero_grad()
            perturbed = forward_backward()
        across = orthogonal(_gradients(weights), g)
        torch._foreach_copy_(list(directions.values()), across)
        return perturbed

    def _reuse(self) -> None:
        pairs = zip(self._weights.values(), self._g_v().values(), strict=True)
        moved = [(w.grad, direction) for w, direction in pairs if w.grad is not None]
        g = [gradient for gradient, _ in moved]
        length = self.own.looksam_alpha * perturb.norm(g)
        perturb.move_(g, [direction for _, direction in moved], length)

    def _g_v(self) -> dict[str, Tensor]:
        """g_v by name, zero before the first step."""
        if not self._directions:
            for target in self.targets:
                named = adapters.named_parameters(target.model, PRIMARY)
                named = {**named, **adapters.whole(target.model, PRIMARY)}
                start = f"{target.name}/{DIRECTION}/"
                self._weights |= {start + name: weight for name, weight in named.items()}
            self._directions = {
                name: torch.zeros_like(weight, requires_grad=False)
                for name, weight in self._weights.items()
            }
        return self._directions


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
