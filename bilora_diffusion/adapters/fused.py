"""A fused forward for PEFT's LoRA layers, with one low-rank product for all adapters.

PEFT computes one product per adapter; the fused forward computes W0 x + [s1 B1, s2 B2] [A1; A2] x.
The parameters stay separate and are joined in each forward pass. The product runs in the precision
of the base layer's output (under autocast, in autocast's precision), so x is not copied to fp32 as
in PEFT. `products` has hand-written forward and backward functions: autograd would add the product
to the base layer's output through a view, which takes six more operations on all activations. For a
convolution, the A of all adapters become one convolution whose number of channels is the sum of the
ranks. A layer in a state that one product can't express uses PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar, cast

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .access import weights
from .products import AdapterConvolution, AdapterProduct


class FusedLayer:
    """Mixin that replaces the forward of a PEFT layer class and leaves the layer's state alone."""

    quantized: ClassVar[bool] = False  # whether the base weight is stored in 4 bits

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active: list[str] | None = None
        # Other arguments are for PEFT, such as adapter_names, which selects an adapter per row.
        if not args and not kwargs:
            active = _active_plain_adapters(self, x)
        if active is not None:
            return _fused_forward(self, x, active)
        with _peft_precision(self, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def _peft_precision(layer: Any, x: Tensor) -> AbstractContextManager[Any]:
    """Return the context in which a layer runs PEFT's own forward."""
    if layer.quantized and layer.lora_variant and torch.is_autocast_enabled(x.device.type):
        # Under CUDA autocast, PEFT's 4-bit layer computes DoRA's norms in half precision, with an
        # error of up to 0.4 %. PEFT's float layer computes them in fp32.
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _fused_forward(layer: Any, x: Tensor, active: Sequence[str]) -> Tensor:
    """Return the base layer's output plus one product for all active adapters."""
    base = layer.base_layer
    is_plain_base = layer.quantized or type(base) in (nn.Linear, nn.Conv2d)
    is_autocast = torch.is_autocast_enabled(x.device.type)
    if is_plain_base and is_autocast and x.dtype == torch.float32:
        # Convert x here, since autocast would convert it twice: for the base and for the adapters.
        x = x.to(torch.get_autocast_dtype(x.device.type))
    output = weight = bias = None
    if _is_frozen_linear(base):
        # `AdapterProduct` also computes the base layer's output, to which it adds in place.
        dtype = _output_dtype(x, base.weight)
        x = x.to(dtype)
        weight = base.weight.to(dtype)
        if base.bias is not None:
            bias = base.bias.to(dtype)
    else:
        output = base(x)
        x = x.to(output.dtype)
    # Not `list[Tensor]()`, which torch.compile can't trace.
    factors: list[Tensor] = []  # A and B of each adapter
    scales: list[float] = []  # alpha / rank of each adapter
    for name in active:
        factors += weights(layer, name)
        scales.append(layer.scaling[name])
    if factors[0].dim() > 2:  # A is the kernel of a convolution
        return AdapterConvolution.apply(x, output, base.stride, base.padding, scales, *factors)  # type: ignore[no-any-return]
    return AdapterProduct.apply(x, output, weight, bias, scales, *factors)  # type: ignore[no-any-return]


class FusedLinear(FusedLayer, lora.Linear):
    """PEFT's LoRA layer over a linear layer, with the fused forward."""


class FusedConv2d(FusedLayer, lora.Conv2d):
    """PEFT's LoRA layer over a convolution, with the fused forward."""


def fuse(model: nn.Module) -> int:
    """Switch LoRA layers on linear layers and Conv2d to the fused forward; return their number."""
    count = 0
    # The list is complete before the first module's class changes.
    for module in list(model.modules()):
        if not isinstance(module, LoraLayer):
            continue
        fused_class = _fused_class(type(module))
        if fused_class is not None:
            module.__class__ = fused_class
            count += 1
    return count


def unfuse(model: nn.Module) -> None:
    """Restore PEFT's own forward on every LoRA layer."""
    for module in model.modules():
        if isinstance(module, FusedLayer):
            # The method resolution order is (FusedLinear, FusedLayer, PEFT's class, ...).
            module.__class__ = type(module).__mro__[2]


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Use PEFT's own forward within the context, then fuse the same layers again."""
    fused_layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    unfuse(model)
    try:
        yield
    finally:
        for layer in fused_layers:
            fuse(cast(nn.Module, layer))


@cache
def _fused_class(peft_class: type) -> type | None:
    """Return the fused version of a PEFT layer class; None if there is none."""
    if issubclass(peft_class, FusedLayer):
        return peft_class
    if peft_class is lora.Linear:
        return FusedLinear
    if peft_class is lora.Conv2d:
        return FusedConv2d
    # Compared by name, since PEFT defines its 4-bit layer only if bitsandbytes is installed.
    if peft_class.__module__.startswith("peft.") and peft_class.__name__ == "Linear4bit":
        members = {"__module__": __name__, "quantized": True}
        return type(f"Fused{peft_class.__name__}", (FusedLayer, peft_class), members)
    return None


def _active_plain_adapters(layer: Any, x: Tensor) -> list[str] | None:
    """Return the active adapters if one product can express them; None if PEFT's forward must run.

    Args:
        layer: PEFT LoRA layer.
        x: the layer's input.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    # Read the modules' dictionaries directly, as in `access.weights`.
    modules = layer._modules
    A = modules["lora_A"]._modules
    B = modules["lora_B"]._modules
    dropout = modules["lora_dropout"]._modules
    active = [name for name in layer.active_adapters if name in A]
    if not active:
        return None
    # An evaluation of the primary must be bit-identical to PEFT with the exported file.
    if len(active) == 1 and not layer.training:
        return None
    # fp16 without autocast would lose small values of B; PEFT computes in fp32.
    if x.dtype == torch.float16 and not torch.is_autocast_enabled(x.device.type):
        return None
    for name in active:
        # DoRA and other variants are not a plain product.
        if name in layer.lora_variant or layer.lora_bias[name]:
            return None
        if layer.training and type(dropout[name]) is not nn.Identity:
            return None
        if not (_is_plain(A[name]) and _is_plain(B[name])):
            return None
    return active


def _is_plain(module: nn.Module) -> bool:
    """Return whether a layer is plain: numeric padding, no hooks and the forward of its class.

    Offloading and tensor parallelism add hooks to a module or replace its forward.
    """
    return (
        type(module) in (nn.Linear, nn.Conv2d)
        and not isinstance(getattr(module, "padding", None), str)
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and "forward" not in module.__dict__
    )


def _is_frozen_linear(base: nn.Module) -> bool:
    """Return whether a base layer computes x W^T + b without hooks and has frozen W and b."""
    if type(base) is not nn.Linear or not _is_plain(base):
        return False
    for parameter in base._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return False
    return True


def _output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's output."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
