"""LoRA-oBAR and LoRA-nBAR: the balancing that SAM does to A and B, without its second gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..adapters import PRIMARY
from ..errors import UserError
from .base import Counting, MethodOptions, register
from .hooks import unwrapped
from .options import falling


class _BAR(Counting, ABC):
    """Before each optimizer step one factor of a layer shrinks by 1 - alpha_t lr_t, the other grows
    by 1 + alpha_t lr_t; which one is the subclass's choice. Steps that a gradient scaler skips
    change nothing.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"bar_alpha", "bar_schedule"})
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"bar_alpha": 0.0})

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, dict[str, Any]]] = []
        self._hook: RemovableHandle | None = None

    @property
    def depends_on_length(self) -> bool:
        return self.options.bar_schedule != "constant"

    def bind(self, optimizer: Optimizer) -> None:
        """Balance before every step of `optimizer`.

        Raises:
            UserError: it lacks a parameter of the adapters, or can't be hooked.
        """
        optimizer = unwrapped(optimizer)
        if self._hook is not None:
            self._hook.remove()
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._pairs = []
        for name, layer in self.layers():
            A, B = (cast(nn.Parameter, h[PRIMARY].weight) for h in (layer.lora_A, layer.lora_B))
            if id(A) not in groups:
                raise UserError(f"The optimizer lacks {name}; make it from param_groups().")
            self._pairs.append((A, B, groups[id(A)]))
        self._hook = optimizer.register_step_pre_hook(self._balance)

    @abstractmethod
    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        """For each layer whether A is the factor that shrinks, (layers,) bool."""

    @torch.no_grad()
    def _balance(self, *_: Any) -> None:
        self.taken += 1
        strength = self.options.bar_alpha
        if self.depends_on_length:
            progress = self.options.progress(self.taken)
            strength *= falling(self.options.bar_schedule, progress)
        A = [a for a, _, _ in self._pairs]
        B = [b for _, b, _ in self._pairs]
        signs = torch.where(self.shrinks_A(A, B), -1.0, 1.0).unbind()
        for sign, (a, b, group) in zip(signs, self._pairs, strict=True):
            change = sign.to(a.dtype) * (strength * group["lr"])
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
        return _norms([_gradient(p) for p in A]) < _norms([_gradient(p) for p in B])


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Frobenius norms, (len(tensors),), on the first one's device."""
    wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([norm.to(wide[0].device) for norm in torch._foreach_norm(wide)])


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
