"""LoRA with a penalty on the change of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from .. import adapters
from ..adapters import PRIMARY
from .base import HookedMethod
from .bilora.auxiliary import norm_scales
from .bilora.radius import weight_changes
from .options import L2SPOptions
from .registry import register


@register("lora-l2sp")
class LoRAL2SP(HookedMethod):
    """min over B, A of L(W0 + s B A) + lambda ||dW||_F^2 with dW = s B A, over all layers.

    With G = 2 lambda s dW the penalty's gradient is G A^T for B and B^T G for A; dW is never
    formed. Where an init took first values out of the weights, dW counts from these. Weight decay
    shrinks A and B separately and is not part of Adam's moments; the penalty's gradient is. The
    gradient norm that is clipped, and the logged loss, are without the penalty.

    Source: L2-SP (Li et al. 2018, https://arxiv.org/abs/1802.01483, Eq. 2) on the product, as
    personalization uses it (https://arxiv.org/abs/2505.19519).
    """

    title = "LoRA + L2-SP"
    summary = "Trained as LoRA with a penalty on the squared norm of the change of the weights."

    own_options = L2SPOptions
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType(
        {"settings": L2SPOptions(l2sp_lambda=0.0)}
    )

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        scales = norm_scales(self.layers, "scaled", PRIMARY)
        changes = weight_changes(self.layers, scales)
        for (_path, layer), change in zip(self.layers, changes, strict=True):
            A, B = adapters.weights(layer, PRIMARY)
            factor = 2 * self.settings.l2sp_lambda * change.scale**2
            # s dW = s^2 (change.B change.A), so the penalty's gradients are factor times these.
            if A.grad is not None:  # else the loss does not reach the layer
                g_A = (B.flatten(1).T @ change.B) @ change.A  # (r, n)
                A.grad.add_(g_A.view_as(A), alpha=factor)
            if B.grad is not None:
                g_B = change.B @ (change.A @ A.flatten(1).T)  # (m, r)
                B.grad.add_(g_B.view_as(B), alpha=factor)
