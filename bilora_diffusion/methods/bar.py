"""LoRA-oBAR and LoRA-nBAR: balance A and B as SAM does, without SAM's second gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..adapters import PRIMARY, weights
from ..core.errors import UserError
from . import perturb
from .base import CountingMethod, unwrap
from .options import MethodOptions, falling
from .registry import register


class BAR(CountingMethod, ABC):
    """Base class of methods that balance each layer's factors before each optimizer step.

    One factor is multiplied by 1 - alpha_t lr_t and the other by 1 + alpha_t lr_t, where lr_t is
    the learning rate of step t. A subclass chooses the factor that shrinks. Steps that a gradient
    scaler skips change nothing, and layers without a gradient are not balanced.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"bar_alpha", "bar_schedule"})
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"bar_alpha": 0.0})

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self.depends_on_length = self.options.bar_schedule != "constant"
        self._hook: RemovableHandle | None = None

    def bind(self, optimizer: Optimizer) -> None:
        """Balance the factors before every step of `optimizer`.

        Raises:
            UserError: the optimizer lacks a parameter of the adapters, or can't have hooks.
        """
        optimizer = unwrap(optimizer)
        # Here the rates only show which parameters the optimizer has. Each step reads them again,
        # since accelerate's `prepare` and a resume replace the groups.
        rates = _learning_rates(optimizer)
        for path, layer in self.layers:
            A, B = weights(layer, PRIMARY)
            if id(A) not in rates or id(B) not in rates:
                raise UserError(f"The optimizer lacks {path}; create it from param_groups().")
        super().bind(optimizer)
        if self._hook is not None:  # the method was bound to another optimizer before
            self._hook.remove()
        # The hook does not run in steps that a gradient scaler skips.
        self._hook = optimizer.register_step_pre_hook(self._balance)

    @abstractmethod
    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        """Return whether A is the factor that shrinks, for each layer: (layers,) bool."""

    @torch.no_grad()
    def _balance(self, optimizer: Optimizer, *_: Any) -> None:
        self.steps_taken += 1
        strength = self.options.bar_alpha
        if self.depends_on_length:
            progress = self.options.progress(self.steps_taken)
            strength *= falling(self.options.bar_schedule, progress)
        # Skip layers without a gradient: the step does not move them, and SAM would not balance
        # them either.
        layers_A: list[nn.Parameter] = []
        layers_B: list[nn.Parameter] = []
        for _path, layer in self.layers:
            A, B = weights(layer, PRIMARY)
            if A.grad is not None and B.grad is not None:
                layers_A.append(A)
                layers_B.append(B)
        if not layers_A:
            return
        rates = _learning_rates(optimizer)
        # The signs stay on the device, since reading them would wait for it.
        signs = torch.where(self.shrinks_A(layers_A, layers_B), -1.0, 1.0).unbind()
        for sign, A, B in zip(signs, layers_A, layers_B, strict=True):
            # (1 - alpha_t lr_t) for one factor, (1 + alpha_t lr_t) for the other
            change = sign.to(A.dtype) * (strength * rates[id(A)])
            A.mul_(1 + change)
            B.mul_(1 - change)


@register("lora-obar")
class LoRAoBAR(BAR):
    """LoRA-oBAR: the factor with the larger norm shrinks.

    Source: Algorithm 2 of Li et al. 2024a (https://arxiv.org/abs/2410.14802), for overparameterized
    problems and problems with one sample.
    """

    title = "LoRA-oBAR"
    summary = "Trained as LoRA, with the factors balanced by their norms in each step (oBAR)."

    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        return perturb.norms(A) >= perturb.norms(B)


@register("lora-nbar")
class LoRAnBAR(BAR):
    """LoRA-nBAR: the factor with the smaller gradient shrinks (Algorithm 3 of Li et al. 2024a)."""

    title = "LoRA-nBAR"
    summary = "Trained as LoRA, with the factors balanced by their gradients in each step (nBAR)."

    def shrinks_A(self, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]) -> Tensor:
        g_A = [cast(Tensor, factor.grad) for factor in A]
        g_B = [cast(Tensor, factor.grad) for factor in B]
        return perturb.norms(g_A) < perturb.norms(g_B)


def _learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """Return each parameter's learning rate by the parameter's id.

    For Prodigy, the learning rate is lr times Prodigy's estimate d.
    """
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"] * group.get("d", 1.0)
    return rates
