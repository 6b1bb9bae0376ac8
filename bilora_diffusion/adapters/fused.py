"""One low-rank product for both adapters: W0 x + [s1 B1, s2 B2] [A1; A2] x, PEFT's sum of two.

The parameters stay separate; they are put side by side in each forward. The product runs in the
precision of the base's output (autocast's where it is on), so x is not copied to fp32 as PEFT does.
Where a layer is in a state that one product can't express, that call goes to PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_QUANTIZED = (
    "Linear4bit",
)  # PEFT layers whose base computes for itself and returns an ordinary tensor


class _Fused:
    """Comes before a PEFT linear layer's class; the layer's state is untouched."""

    quantized: ClassVar[bool] = False

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = None if args or kwargs else _plain_adapters(self, x)
        if active is None:
            if self.quantized and self.lora_variant and torch.is_autocast_enabled(x.device.type):
                # Under CUDA's autocast PEFT's 4-bit layer takes DoRA's norms in half precision,
                # which is up to 0.4 % off; its float layer takes them in fp32.
                with torch.autocast(x.device.type, enabled=False):
                    return super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = self.base_layer
        ordinary = type(base) is nn.Linear
        known = ordinary or self.quantized
        if known and x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for the base and the adapters
        result = base(x)
        down, up, scale = _side_by_side(self, active, result.dtype)
        hidden = F.linear(x.to(result.dtype), down).reshape(-1, down.shape[0])
        if not result.is_contiguous():
            return result + F.linear(hidden, up).view(result.shape) * scale
        rows = result.view(-1, result.shape[-1])
        if ordinary and not base._forward_hooks:  # the result is nobody else's
            return rows.addmm_(hidden, up.t(), alpha=scale).view(result.shape)
        return torch.addmm(rows, hidden, up.t(), alpha=scale).view(result.shape)


class FusedLinear(_Fused, lora.Linear):
    """PEFT's LoRA layer over a linear layer, with the fused forward."""


def fuse(model: nn.Module) -> int:
    """Give LoRA layers over linear layers the fused forward; returns how many have it now."""
    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and (kind := _fused_class(type(module))) is not None:
            module.__class__ = kind
            count += 1
    return count


def unfuse(model: nn.Module) -> None:
    """Give every LoRA layer PEFT's own forward back."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = type(module).__mro__[2]


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Within the context PEFT's own forward runs; afterwards all is as it was."""
    before = [module for module in model.modules() if isinstance(module, _Fused)]
    unfuse(model)
    try:
        yield
    finally:
        for module in before:
            fuse(cast(nn.Module, module))


@cache
def _fused_class(kind: type) -> type | None:
    if issubclass(kind, _Fused):
        return kind
    if kind is lora.Linear:
        return FusedLinear
    if kind.__module__.startswith("peft.") and kind.__name__ in _QUANTIZED:
        own = {"__module__": __name__, "quantized": True}
        return type(f"Fused{kind.__name__}", (_Fused, kind), own)
    return None


def _plain_adapters(layer: Any, x: Tensor) -> list[str] | None:
    """The one or two adapters to run as one product, or None if this call is PEFT's."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not 1 <= len(active) <= 2:
        return None
    training = layer.training
    if len(active) == 1 and not training:
        return None  # to the bit what PEFT makes of the exported file
    if x.dtype == torch.float16 and not torch.is_autocast_enabled(x.device.type):
        return None  # fp16 alone would lose small B; PEFT computes in fp32
    for name in active:
        if name in layer.lora_variant or layer.lora_bias[name]:
            return None
        if training and type(layer.lora_dropout[name]) is not nn.Identity:
            return None
        if not (_ordinary(layer.lora_A[name]) and _ordinary(layer.lora_B[name])):
            return None
    return active


def _ordinary(module: nn.Module) -> bool:
    """Whether no hook or wrapper (offloading, tensor parallelism) adds to the weight."""
    return (
        type(module) is nn.Linear
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and "forward" not in module.__dict__
    )


def _side_by_side(
    layer: Any, active: list[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """[A1; A2] (r1 + r2, n), [B1, B2 s2 / s1] (m, r1 + r2) and s1; of one adapter: A, B, s."""
    first, *rest = active
    down, up, scale = layer.lora_A[first].weight, layer.lora_B[first].weight, layer.scaling[first]
    for name in rest:
        other, ratio = layer.lora_B[name].weight, layer.scaling[name] / scale
        down = torch.cat((down, layer.lora_A[name].weight))
        up = torch.cat((up, other if ratio == 1 else other * ratio), dim=1)
    return down.to(dtype), up.to(dtype), scale
