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
from .base import CountingMethod, StepOptimizer
from .lora_sam import LoRASAM
from .options import LookSAMOptions
from .registry import register

DIRECTION = "direction"


@register("lora-looksam")
class LoRALookSAM(LoRASAM, CountingMethod):
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
        {"rho": 1e-30, "settings": LookSAMOptions(looksam_alpha=0.0)}
    )

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        # Steps 1, k + 1, 2 k + 1, ...
        is_sam_step = self.steps_taken % self.settings.looksam_k == 0
        self.steps_taken += 1
        loss = forward_backward()
        if is_sam_step:
            self.losses = (loss, self._sam_gradient(forward_backward, optimizer))
        else:
            self.losses = None
            self._add_direction()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self._g_v}

    def _sam_gradient(
        self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer
    ) -> Tensor:
        """Replace the gradients by SAM's, and store g_v; returns the loss uphill."""
        weights = list(self._named_weights.values())
        # Copies, since the second pass needs `.grad`.
        g = _gradients(weights)
        with perturb.restored(weights):
            perturb.move_(weights, g, self.rho)  # w + rho g / ||g||
            optimizer.zero_grad()
            perturbed = forward_backward()
        # `.grad` holds g_s, which the optimizer steps with; its part across g is stored.
        g_v = orthogonal(_gradients(weights), g)
        torch._foreach_copy_(list(self._g_v.values()), g_v)
        return perturbed

    def _add_direction(self) -> None:
        """Add alpha ||g|| / ||g_v|| g_v to the gradients."""
        # A layer without a gradient is one that no step moves.
        gradients, directions = list[Tensor](), list[Tensor]()
        for weight, direction in zip(self._named_weights.values(), self._g_v.values(), strict=True):
            if weight.grad is not None:
                gradients.append(weight.grad)
                directions.append(direction)
        # `move_` divides by ||g_v||.
        length = self.settings.looksam_alpha * perturb.norm(gradients)
        perturb.move_(gradients, directions, length)

    @cached_property
    def _named_weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by the keys of g_v in a checkpoint."""
        # Once, after `setup`: it walks through the models.
        weights: dict[str, nn.Parameter] = {}
        for target in self.targets:
            factors = adapters.named_parameters(target.model, PRIMARY)
            heads = adapters.head_parameters(target.model, PRIMARY)
            for path, weight in (*factors.items(), *heads.items()):
                weights[f"{target.name}/{DIRECTION}/{path}"] = weight
        return weights

    @cached_property
    def _g_v(self) -> dict[str, Tensor]:
        """g_v by name, zero before the first step."""
        return {
            key: torch.zeros_like(weight, requires_grad=False)
            for key, weight in self._named_weights.items()
        }


def _gradients(weights: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the gradients, zero where there is none."""
    gradients: list[Tensor] = []
    for weight in weights:
        if weight.grad is None:  # a layer that the loss does not reach
            gradients.append(torch.zeros_like(weight))
        else:
            gradients.append(weight.grad.clone())
    return gradients


@torch.no_grad()
def orthogonal(vectors: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """v - <v, g> / ||g||^2 g, over all tensors together; v itself where g is zero.

    Args:
        vectors: v, changed in place.
        gradients: g, of the same shapes.
    """
    # `where` and no `if`: to read the norm would wait for the device.
    square = perturb.dot(gradients, gradients)
    factor = torch.where(square > 0, perturb.dot(vectors, gradients) / square, 0.0)
    factors = [factor.to(g.device, g.dtype) for g in gradients]
    torch._foreach_sub_(vectors, torch._foreach_mul(gradients, factors))
    return vectors
