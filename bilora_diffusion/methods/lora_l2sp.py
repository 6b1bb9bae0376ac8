"""LoRA with a penalty on how far the weights move from where they were."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from .. import adapters
from ..adapters import PRIMARY
from .bilora import auxiliary, radius
from .hooks import BeforeStep
from .options import L2SPOptions
from .registry import register


@register("lora-l2sp")
class LoRAL2SP(BeforeStep):
    """min over B, A of L(W0 + s B A) + lambda ||dW||_F^2 with dW = s B A, over all layers.

    With G = 2 lambda s dW the gradient of the penalty is G A^T of B and B^T G of A; dW is never
    formed. Of a start that was taken out of the weights dW counts from there. Weight decay shrinks
    A and B apart, outside of Adam's moments; the penalty's gradient is part of them. Clipping and
    the logged loss are without it.

    Source: L2-SP (Li et al. 2018, https://arxiv.org/abs/1802.01483, Eq. 2) on the product, as
    personalization uses it (https://arxiv.org/abs/2505.19519).
    """

    title = "LoRA + L2-SP"
    summary = "Trained as LoRA with a penalty on the squared norm of the change of the weights."

    own_options = L2SPOptions
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType(
        {"own": L2SPOptions(l2sp_lambda=0.0)}
    )

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        scales = auxiliary.scales(self.primary_layers, "scaled", PRIMARY)
        changes = radius.changes(self.primary_layers, scales)
        for (_name, layer), change in zip(self.primary_layers, changes, strict=True):
            weights = adapters.weights(layer, PRIMARY)
            A, B = (weight.flatten(1) for weight in weights)
            factor = 2 * self.own.l2sp_lambda * change.scale**2
            gradients = (B.T @ change.B) @ change.A, change.B @ (change.A @ A.T)
            for weight, moved in zip(weights, gradients, strict=True):
                if (gradient := weight.grad) is not None:  # else no step moves the layer
                    gradient.add_(moved.view_as(weight), alpha=factor)
