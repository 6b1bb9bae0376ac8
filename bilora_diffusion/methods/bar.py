"""LoRA-oBAR and LoRA-nBAR: the balancing that SAM does to A and B, without its second gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters import PRIMARY, weights
from ..core.errors import UserError
from .base import Counting
from .hooks import BeforeStep, unwrapped
from .options import falling
from .registry import register


class _BAR(BeforeStep, Counting, ABC):
    """Before each optimizer step one factor of a layer shrinks by 1 - alpha_t lr_t, the other grows
    by 1 + alpha_t lr_t, with the rate that this step has; which one is the subclass's choice.
    Steps that a gradient scaler skips change nothing, nor does a step without a layer's gradient
    change that layer.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"bar_alpha", "bar_schedule"})
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"bar_alpha": 0.0})

    @property
    def depends_on_length(self) -> bool:
        return self.options.bar_schedule != "constant"

    def bind(self, optimizer: Optimizer) -> None:
        """Balance before every step of `optimizer`.

        Raises:
            UserError: it lacks a parameter of the adapters, or can't be hooked.
        """
        rates = _rates(unwrapped(optimizer))
        for name, layer in self.layers():
            if any(id(factor) not in rates for factor in weights(layer, PRIMARY)):
                raise UserError(f"The optimizer lacks {name}; make it from param_groups().")
        super().bind(optimizer)

    @abstractmethod
    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        """For each layer whether A is the factor that shrinks, (layers,) bool."""

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.taken += 1
        strength = self.options.bar_alpha
        if self.depends_on_length:
            progress = self.options.progress(self.taken)
            strength *= falling(self.options.bar_schedule, progress)
        # A layer without a gradient is one that no step moves: SAM's would not balance it either.
        pairs = [weights(layer, PRIMARY) for _, layer in self.primary_layers]
        pairs = [(a, b) for a, b in pairs if a.grad is not None and b.grad is not None]
        if not pairs:
            return
        rates = _rates(optimizer)
        shrinks = self.shrinks_A([a for a, _ in pairs], [b for _, b in pairs])
        signs = torch.where(shrinks, -1.0, 1.0).unbind()
        for sign, (a, b) in zip(signs, pairs, strict=True):
            change = sign.to(a.dtype) * (strength * rates[id(a)])
            a.mul_(1 + change)
            b.mul_(1 - change)


@register("lora-obar")
class LoRAoBAR(_BAR):
    """The factor of the larger norm shrinks (Algorithm 2 of Li et al. 2024a,
    https://arxiv.org/abs/2410.14802, for problems of one sample or of overparameterized kind).
    """

    title = "LoRA-oBAR"
    summary = "Trained as LoRA with factors balanced by their norms at each step (oBAR)."

    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        return _norms(A) >= _norms(B)


@register("lora-nbar")
class LoRAnBAR(_BAR):
    """The factor of the smaller gradient shrinks (Algorithm 3 of Li et al. 2024a)."""

    title = "LoRA-nBAR"
    summary = "Trained as LoRA with factors balanced by their gradients at each step (nBAR)."

    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        return _norms(_gradients(A)) < _norms(_gradients(B))


def _rates(optimizer: Optimizer) -> dict[int, float]:
    """The learning rate now of each parameter, by its id; Prodigy's is its estimate d times lr."""
    return {
        id(parameter): group["lr"] * group.get("d", 1.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Frobenius norms, (len(tensors),), on the first one's device."""
    wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([norm.to(wide[0].device) for norm in torch._foreach_norm(wide)])


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [cast(Tensor, parameter.grad) for parameter in parameters]
