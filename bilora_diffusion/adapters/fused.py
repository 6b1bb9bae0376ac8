"""One low-rank product for both adapters: W0 x + [s1 B1, s2 B2] [A1; A2] x, PEFT's sum of two.

The parameters stay separate. Each forward joins them, or takes the joined factors of the samples
from a `SampleAdapter`. The product runs in the precision of the base's output (autocast's where it
is on), so x is not copied to fp32 as PEFT does. Forward and backward are written out: autograd
would add the product to the base's output through a view, and pay six more operations on all of the
activations. The A of a convolution's adapters become one convolution with as many channels as both
ranks. A layer in a state that one product can't express is left to PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .access import weights
from .per_sample_factors import LayerSlot, acting_slot, add_per_sample_convolution


class FusedLayer:
    """Base that is put before the class of a PEFT layer; the layer's state stays as it is."""

    quantized: ClassVar[bool] = False
    sample_slot: LayerSlot | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slot: LayerSlot | None = None
        if not self._disable_adapters:
            slot = acting_slot(self, x)
        replaced: str | None = None  # PEFT's adapter in whose place the samples' factors act
        if slot is not None:
            replaced = slot.adapter.name
            if slot.adapter.factors is None:
                slot = None  # no sample of the batch has factors: the adapter is only left out
        active: list[str] | None = None
        if not args and not kwargs:  # such as PEFT's adapter_names, one for each row
            active = _active_plain_adapters(self, x, replaced)
        if active is not None and (slot is None or active == slot.adapter.fused_with):
            return self._fused_forward(x, active, slot)
        output = self._peft_forward(x, replaced, *args, **kwargs)
        if slot is not None:
            output = _add_sample_product(x, output, slot)
        return output

    def _peft_forward(
        self: Any, x: Tensor, replaced: str | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """PEFT's own forward, without the adapter `replaced`."""
        if replaced is not None:
            active_adapters = self._active_adapter
            self._active_adapter = [name for name in self.active_adapters if name != replaced]
            try:
                return self._peft_forward(x, None, *args, **kwargs)
            finally:
                self._active_adapter = active_adapters
        precision: AbstractContextManager[Any] = nullcontext()
        if self.quantized and self.lora_variant and torch.is_autocast_enabled(x.device.type):
            # Under CUDA's autocast PEFT's 4-bit layer takes DoRA's norms in half precision,
            # which is up to 0.4 % off; its float layer takes them in fp32.
            precision = torch.autocast(x.device.type, enabled=False)
        with precision:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _fused_forward(
        self: Any, x: Tensor, active: Sequence[str], slot: LayerSlot | None
    ) -> Tensor:
        """The base's output plus one product for the active adapters and the samples' factors."""
        base = self.base_layer
        if (
            (self.quantized or type(base) in (nn.Linear, nn.Conv2d))
            and x.dtype == torch.float32
            and torch.is_autocast_enabled(x.device.type)
        ):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for the base and the adapters
        if _is_frozen_linear(base):
            # The base's product belongs to the function below, which adds to it in place.
            dtype = _output_dtype(x, base.weight)
            weight = base.weight.to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            output, x = None, x.to(dtype)
        else:
            output = base(x)
            weight, bias, x = None, None, x.to(output.dtype)
        # Not `list[Tensor]()`, which torch.compile can't trace.
        factors: list[Tensor] = []  # A and B of each adapter
        scales: list[float] = []  # alpha / rank of each
        for name in active:
            factors += weights(self, name)
            scales.append(self.scaling[name])
        if factors[0].dim() > 2:  # A has the kernel of a convolution
            result: Tensor = _Convolution.apply(
                x, output, base.stride, base.padding, scales, *factors
            )
            # The samples' convolutions are grouped, so the primary's is computed apart.
            if slot is not None:
                result = add_per_sample_convolution(x, result, slot)
            return result
        if slot is not None:
            joined = slot.factors(x.dtype, with_primary=True)
            factors = [joined.A, joined.B_transposed]
            scales = [slot.adapter.scale]
        return _Product.apply(x, output, weight, bias, scales, slot is not None, *factors)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """y + s x A^T B^T with y = W x + b, or y given.

    A is (R, in) and B (out, R) of all adapters, joined here or given joined (`is_joined`); R is the
    sum of their ranks. Where each sample has factors of its own they are (samples, R, in) and
    (samples, R, out).

    B is stored and its gradient computed transposed, (R, out): a product with few columns takes two
    to four times as long on a CPU. The gradients are those of the single adapters' factors, in
    their own precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        scales: list[float],
        is_joined: bool,
        *factors: Tensor,
    ) -> Tensor:
        ctx.scale = scales[0]  # `_join` brings the other scales into B
        ctx.is_joined = is_joined
        A, B_transposed = factors if is_joined else _join(ctx, factors, scales, x.dtype)
        inputs = _split_samples(x, A)  # (tokens, in) or (samples, tokens, in)
        hidden = (inputs @ A.mT).mul_(ctx.scale)  # (..., tokens, R)
        if weight is not None:
            result = F.linear(inputs, weight, bias)  # (..., tokens, out)
        else:
            # A copy, since an autograd function must not change its inputs.
            result = _split_samples(output, A).contiguous().clone()
        _add_product_(result, hidden, B_transposed)
        ctx.save_for_backward(inputs, weight, A, B_transposed, hidden)
        ctx.shape = x.shape
        return result.view(x.shape[:-1] + result.shape[-1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, weight, A, B_transposed, hidden = ctx.saved_tensors
        g_output = _split_samples(gradient, A)  # (..., tokens, out)
        g_hidden = (g_output @ B_transposed.mT).mul_(ctx.scale)  # (..., tokens, R)
        g_x = None
        if ctx.needs_input_grad[0]:
            # Without the weight the base's part comes back through `g_base`.
            g_x = g_hidden @ A if weight is None else _add_product_(g_output @ weight, g_hidden, A)
            g_x = g_x.view(ctx.shape)
        g_A = g_hidden.mT @ inputs  # (..., R, in)
        g_B_transposed = hidden.mT @ g_output  # (..., R, out); `hidden` has the scale
        g_base = gradient if ctx.needs_input_grad[1] else None
        # In the order of forward's arguments; weight, bias, scales, is_joined have none.
        gradients = [g_x, g_base, None, None, None, None]
        if ctx.is_joined:
            gradients += g_A, g_B_transposed
        else:
            gradients += _separate(ctx, g_A, g_B_transposed)
        return tuple(gradients)


def _split_samples(values: Tensor, A: Tensor) -> Tensor:
    """(tokens, features), or (samples, tokens, features) for an A of (samples, R, in)."""
    features = values.shape[-1]
    if A.dim() == 2:
        return values.reshape(-1, features)
    return values.reshape(len(A), -1, features)


def _add_product_(result: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left @ right in place."""
    if result.dim() == 2:
        return result.addmm_(left, right)
    return result.baddbmm_(left, right)


def _add_sample_product(x: Tensor, output: Tensor, slot: LayerSlot) -> Tensor:
    """Add the product of each sample's own factors to the output of a layer."""
    x = x.to(output.dtype)
    if slot.is_convolution:
        return add_per_sample_convolution(x, output, slot)
    factors = slot.factors(x.dtype, with_primary=False)
    scales = [slot.adapter.scale]
    return _Product.apply(x, output, None, None, scales, True, factors.A, factors.B_transposed)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """y + s B (A * x) with A (R, channels, height, width) and B (out, R, 1, 1), y given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        scales: list[float],
        *factors: Tensor,
    ) -> Tensor:
        ctx.scale = scales[0]
        A, B_transposed = _join(ctx, factors, scales, x.dtype)
        B = B_transposed.transpose(0, 1)
        hidden = F.conv2d(x, A, stride=stride, padding=padding)  # (samples, R, height', width')
        ctx.save_for_backward(x, A, B, hidden)
        ctx.stride, ctx.padding = stride, padding
        # (samples, out, height', width')
        return torch.add(output, F.conv2d(hidden, B), alpha=ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, A, B, hidden = ctx.saved_tensors
        g_hidden, g_B = _convolution_gradients(gradient, hidden, B, (1, 1), (0, 0), True)
        g_hidden.mul_(ctx.scale)
        g_B.mul_(ctx.scale)  # `hidden` is without the scale here
        g_x, g_A = _convolution_gradients(
            g_hidden, x, A, ctx.stride, ctx.padding, ctx.needs_input_grad[0]
        )
        g_base = gradient if ctx.needs_input_grad[1] else None
        gradients = [g_x, g_base, None, None, None]  # stride, padding and scales have none
        gradients += _separate(ctx, g_A, g_B.transpose(0, 1))
        return tuple(gradients)


def _convolution_gradients(
    gradient: Tensor, inputs: Tensor, weight: Tensor, stride: Any, padding: Any, with_inputs: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's input, if asked for, and of its weight."""
    dilation, transposed, output_padding, groups = (1, 1), False, (0, 0), 1
    outputs_wanted = (with_inputs, True, False)  # of the input, the weight, the bias
    g_inputs, g_weight, _ = torch.ops.aten.convolution_backward(
        gradient,
        inputs,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        outputs_wanted,
    )
    return g_inputs, g_weight


def _join(
    ctx: Any, factors: tuple[Tensor, ...], scales: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[A1; A2], (R, in), and [B1, B2 s2 / s1]^T, (R, out), of A1, B1, A2, B2.

    `ctx` keeps what `_separate` needs.
    """
    A_parts = list(factors[::2])  # of each adapter (rank, in), or with a convolution's kernel
    B_parts = [B.transpose(0, 1) for B in factors[1::2]]  # of each (rank, out)
    ratios = None
    if scales.count(scales[0]) < len(scales):
        # s1 B1 A1 + s2 B2 A2 = s1 [B1, B2 s2 / s1] [A1; A2]
        ratios = [scale / scales[0] for scale in scales]
        B_parts = [B * ratio for B, ratio in zip(B_parts, ratios, strict=True)]
    ctx.ratios = ratios
    ctx.ranks = [len(A) for A in A_parts]
    A, B_transposed = A_parts[0], B_parts[0]
    if len(A_parts) > 1:
        A, B_transposed = torch.cat(A_parts), torch.cat(B_parts)
    return A.to(dtype), B_transposed.to(dtype, memory_format=torch.contiguous_format)


def _separate(ctx: Any, g_A: Tensor, g_B_transposed: Tensor) -> list[Tensor]:
    """The gradients of what `_join` made as those of each adapter's A and B, in its order."""
    A_parts, B_parts = [g_A], [g_B_transposed]
    if len(ctx.ranks) > 1:
        A_parts, B_parts = list(g_A.split(ctx.ranks)), list(g_B_transposed.split(ctx.ranks))
    if ctx.ratios is not None:
        B_parts = [B * ratio for B, ratio in zip(B_parts, ctx.ratios, strict=True)]
    gradients: list[Tensor] = []
    for A, B_transposed in zip(A_parts, B_parts, strict=True):
        gradients += A, B_transposed.transpose(0, 1).contiguous()
    return gradients


class FusedLinear(FusedLayer, lora.Linear):
    """PEFT's LoRA layer over a linear layer, with the fused forward."""


class FusedConv2d(FusedLayer, lora.Conv2d):
    """PEFT's LoRA layer over a convolution, with the fused forward."""


def fuse(model: nn.Module) -> int:
    """Give LoRA layers over linear layers and Conv2d the fused forward; returns of how many."""
    count = 0
    # A list first: a module's class must not change while the modules are walked.
    for module in list(model.modules()):
        if not isinstance(module, LoraLayer):
            continue
        fused_class = _fused_class(type(module))
        if fused_class is not None:
            module.__class__ = fused_class
            count += 1
    return count


def unfuse(model: nn.Module) -> None:
    """Give every LoRA layer PEFT's own forward back."""
    for module in model.modules():
        if isinstance(module, FusedLayer):
            # The order is (FusedLinear, FusedLayer, PEFT's class, ...).
            module.__class__ = type(module).__mro__[2]


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Within the context PEFT's own forward runs; afterwards all is as it was."""
    fused_layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    unfuse(model)
    try:
        yield
    finally:
        for layer in fused_layers:
            fuse(cast(nn.Module, layer))


@cache
def _fused_class(peft_class: type) -> type | None:
    """The class with the fused forward for a class of PEFT; None where there is none."""
    if issubclass(peft_class, FusedLayer):
        return peft_class
    if peft_class is lora.Linear:
        return FusedLinear
    if peft_class is lora.Conv2d:
        return FusedConv2d
    # By name: PEFT imports its 4-bit layer only where bitsandbytes is installed.
    if peft_class.__module__.startswith("peft.") and peft_class.__name__ == "Linear4bit":
        members = {"__module__": __name__, "quantized": True}
        return type(f"Fused{peft_class.__name__}", (FusedLayer, peft_class), members)
    return None


def _active_plain_adapters(layer: Any, x: Tensor, replaced: str | None) -> list[str] | None:
    """The one or two adapters to compute as one product, or None if this call is PEFT's.

    Args:
        layer: a LoRA layer of PEFT.
        x: its input.
        replaced: an active adapter to leave out, whose place the samples' factors take.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    # Looked up where modules keep them, as `access.weights` does.
    modules = layer._modules
    A, B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropout = modules["lora_dropout"]._modules
    active = [name for name in layer.active_adapters if name in A and name != replaced]
    if not 1 <= len(active) <= 2:
        return None
    if len(active) == 1 and not layer.training:
        return None  # to the bit what PEFT computes with the exported file
    if x.dtype == torch.float16 and not torch.is_autocast_enabled(x.device.type):
        return None  # fp16 alone would lose small B; PEFT computes in fp32
    for name in active:
        if name in layer.lora_variant or layer.lora_bias[name]:
            return None  # DoRA and the like are no plain product
        if layer.training and type(dropout[name]) is not nn.Identity:
            return None
        if not (_is_plain(A[name]) and _is_plain(B[name])):
            return None
    return active


def _is_plain(module: nn.Module) -> bool:
    """Whether no hook or wrapper (offloading, tensor parallelism) adds to the weight, and the
    padding is in numbers.
    """
    return (
        type(module) in (nn.Linear, nn.Conv2d)
        and not isinstance(getattr(module, "padding", None), str)
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and "forward" not in module.__dict__
    )


def _is_frozen_linear(base: nn.Module) -> bool:
    """Whether a base layer is x W^T + b alone, without a hook or a gradient of W and b."""
    if type(base) is not nn.Linear or base._forward_hooks:
        return False
    return not any(p is not None and p.requires_grad for p in base._parameters.values())


def _output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of a linear layer's output."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
