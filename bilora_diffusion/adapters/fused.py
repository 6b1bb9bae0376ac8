"""One low-rank product for both adapters: W0 x + [s1 B1, s2 B2] [A1; A2] x, PEFT's sum of two.

The parameters stay separate; each forward puts them side by side, or takes what `by_row` made. The
product runs in the precision of the base's output (autocast's where it is on), so x is not copied
to fp32 as PEFT does. Forward and backward are written out, for autograd would add the product to
the base's output through a view, at the price of six more operations on all of the activations. Of
a convolution, A's are one with as many channels as both ranks. Where a layer is in a state that one
product can't express, that call goes to PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .access import weights
from .by_row import Rows, add_convolutions, rows_of


class _Fused:
    """Comes before the class of a PEFT layer over a linear layer or a convolution; the layer's
    state is untouched.
    """

    quantized: ClassVar[bool] = False
    rows: Rows | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, without = (None, None) if self._disable_adapters else rows_of(self, x)
        active = None if args or kwargs else _plain_adapters(self, x, without)
        if active is None or (rows is not None and active != rows.seen.beside):
            result = self._peft(x, without, *args, **kwargs)
            return result if rows is None else _add_rows(x, result, rows)
        return self._product(x, active, rows)

    def _peft(self: Any, x: Tensor, without: str | None, *args: Any, **kwargs: Any) -> Tensor:
        if without is not None:
            before = self._active_adapter
            self._active_adapter = [name for name in self.active_adapters if name != without]
            try:
                return self._peft(x, None, *args, **kwargs)
            finally:
                self._active_adapter = before
        if self.quantized and self.lora_variant and torch.is_autocast_enabled(x.device.type):
            # Under CUDA's autocast PEFT's 4-bit layer takes DoRA's norms in half precision,
            # which is up to 0.4 % off; its float layer takes them in fp32.
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _product(self: Any, x: Tensor, active: Sequence[str], rows: Rows | None) -> Tensor:
        base = self.base_layer
        linear = type(base) is nn.Linear
        if (
            (self.quantized or type(base) in (nn.Linear, nn.Conv2d))
            and x.dtype == torch.float32
            and torch.is_autocast_enabled(x.device.type)
        ):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for the base and the adapters
        if linear and not base._forward_hooks and _frozen(base):  # its output is nobody else's
            dtype = _computes_in(x, base.weight)
            weight, bias = (t if t is None else t.to(dtype) for t in (base.weight, base.bias))
            result, x = None, x.to(dtype)
        else:
            result = base(x)
            weight, bias, x = None, None, x.to(result.dtype)
        factors: list[Tensor] = [w for name in active for w in weights(self, name)]
        scales = [self.scaling[name] for name in active]
        if factors[0].dim() > 2:
            made: Any = _Convolution.apply(x, result, base.stride, base.padding, scales, *factors)
            return made if rows is None else add_convolutions(x, made, rows)
        if rows is not None:
            factors, scales = [*rows.sides(True, x.dtype)], [rows.seen.scale]
        return _Product.apply(x, result, weight, bias, scales, rows is not None, *factors)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """y + s x A^T B^T, of y = W x + b or given; A (R, n) and B (m, R) of all adapters side by side,
    or (rows, R, n) and (rows, m, R) where rows see one of their own.

    B is held and its gradient made as rows, (R, m): on a CPU a product with few columns takes two
    to four times as long. The gradients are those of the single adapters' factors, in their own
    precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        scales: list[float],
        beside: bool,
        *factors: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.beside = scales[0], beside
        A, up = factors if beside else _side_by_side(ctx, factors, scales, x.dtype)
        rows = _by_row(x, A)
        hidden = (rows @ A.mT).mul_(ctx.scale)
        if weight is not None:
            made = F.linear(rows, weight, bias)
        else:
            made = _by_row(result, A).contiguous().clone()
        _add_product_(made, hidden, up)
        ctx.save_for_backward(rows, weight, A, up, hidden)
        ctx.shape = x.shape
        return made.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight, A, up, hidden = ctx.saved_tensors
        above = _by_row(gradient, A)
        below = (above @ up.mT).mul_(ctx.scale)
        through = None
        if ctx.needs_input_grad[0]:
            through = below @ A if weight is None else _add_product_(above @ weight, below, A)
            through = through.view(ctx.shape)
        g_A, g_up = below.mT @ rows, hidden.mT @ above
        given = gradient if ctx.needs_input_grad[1] else None
        parts = (g_A, g_up) if ctx.beside else _apart(ctx, g_A, g_up)
        return through, given, None, None, None, None, *parts


def _by_row(values: Tensor, A: Tensor) -> Tensor:
    """(tokens, features), or (rows, tokens, features) for an A with a dimension for rows."""
    return values.reshape(*A.shape[:-2], -1, values.shape[-1])


def _add_product_(to: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return to.addmm_(left, right) if to.dim() == 2 else to.baddbmm_(left, right)


def _add_rows(x: Tensor, result: Tensor, rows: Rows) -> Tensor:
    """The layer's output with each row's own product added."""
    x = x.to(result.dtype)
    if rows.along.weight.dim() > 2:  # type: ignore[operator]
        return add_convolutions(x, result, rows)
    factors, scales = rows.sides(False, x.dtype), [rows.seen.scale]
    return _Product.apply(x, result, None, None, scales, True, *factors)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """y + s B (A * x) of A (R, channels, height, width) and B (m, R, 1, 1), y given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        scales: list[float],
        *factors: Tensor,
    ) -> Tensor:
        ctx.scale = scales[0]
        A, up = _side_by_side(ctx, factors, scales, x.dtype)
        B = up.transpose(0, 1)
        hidden = F.conv2d(x, A, stride=stride, padding=padding)
        ctx.save_for_backward(x, A, B, hidden)
        ctx.stride, ctx.padding = stride, padding
        return torch.add(result, F.conv2d(hidden, B), alpha=ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, A, B, hidden = ctx.saved_tensors

        def back(
            above: Tensor, below: Tensor, weight: Tensor, stride: Any, padding: Any, wanted: bool
        ) -> tuple[Tensor, Tensor]:
            asked = (stride, padding, (1, 1), False, (0, 0), 1, (wanted, True, False))
            return torch.ops.aten.convolution_backward(above, below, weight, None, *asked)[:2]

        g_hidden, g_B = back(gradient, hidden, B, (1, 1), (0, 0), True)
        g_hidden, g_B = g_hidden.mul_(ctx.scale), g_B.mul_(ctx.scale)
        through, g_A = back(g_hidden, x, A, ctx.stride, ctx.padding, ctx.needs_input_grad[0])
        given = gradient if ctx.needs_input_grad[1] else None
        return through, given, None, None, None, *_apart(ctx, g_A, g_B.transpose(0, 1))


def _side_by_side(
    ctx: Any, factors: tuple[Tensor, ...], scales: list[float], to: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[A1; A2] (r1 + r2, n), [B1, B2 s2 / s1]^T (r1 + r2, m); `ctx` keeps what `_apart` needs."""
    downs, ups = list(factors[::2]), [B.transpose(0, 1) for B in factors[1::2]]
    ratios = None
    if scales.count(scales[0]) < len(scales):
        ratios = [scale / scales[0] for scale in scales]
        ups = [up * ratio for up, ratio in zip(ups, ratios, strict=True)]
    ctx.ratios, ctx.ranks = ratios, [len(A) for A in downs]
    A, up = (downs[0], ups[0]) if len(ups) == 1 else (torch.cat(downs), torch.cat(ups))
    return A.to(to), up.to(to, memory_format=torch.contiguous_format)


def _apart(ctx: Any, g_A: Tensor, g_up: Tensor) -> list[Tensor]:
    """Gradients of `_side_by_side` as those of each adapter's A and B."""
    of_A, of_up = [g_A], [g_up]
    if len(ctx.ranks) > 1:
        of_A, of_up = (list(g.split(ctx.ranks)) for g in (g_A, g_up))
    if ctx.ratios is not None:
        of_up = [up * ratio for up, ratio in zip(of_up, ctx.ratios, strict=True)]
    parts: list[Tensor] = []
    for A, up in zip(of_A, of_up, strict=True):
        parts += A, up.transpose(0, 1).contiguous()
    return parts


class FusedLinear(_Fused, lora.Linear):
    """PEFT's LoRA layer over a linear layer, with the fused forward."""


class FusedConv2d(_Fused, lora.Conv2d):
    """PEFT's LoRA layer over a convolution, with the fused forward."""


def fuse(model: nn.Module) -> int:
    """Give LoRA layers over linear layers and Conv2d the fused forward; returns of how many."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kinds = [(layer, kind) for layer in layers if (kind := _fused_class(type(layer))) is not None]
    for layer, kind in kinds:
        layer.__class__ = kind
    return len(kinds)


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
    if kind in (lora.Linear, lora.Conv2d):
        return FusedLinear if kind is lora.Linear else FusedConv2d
    if kind.__module__.startswith("peft.") and kind.__name__ == "Linear4bit":
        own = {"__module__": __name__, "quantized": True}
        return type(f"Fused{kind.__name__}", (_Fused, kind), own)
    return None


def _plain_adapters(layer: Any, x: Tensor, without: str | None) -> list[str] | None:
    """The one or two adapters to run as one product, or None if this call is PEFT's; `without` that
    in whose place rows have others.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    # Looked up where modules keep them, as `access.weights` does.
    A, B, dropout = (layer._modules[kind]._modules for kind in ("lora_A", "lora_B", "lora_dropout"))
    active = [name for name in layer.active_adapters if name in A and name != without]
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
        if training and type(dropout[name]) is not nn.Identity:
            return None
        if not (_ordinary(A[name]) and _ordinary(B[name])):
            return None
    return active


def _ordinary(module: nn.Module) -> bool:
    """Test that no hook or wrapper (offloading, tensor parallelism) adds to the weight and padding
    is in numbers.
    """
    return (
        type(module) in (nn.Linear, nn.Conv2d)
        and not isinstance(getattr(module, "padding", None), str)
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and "forward" not in module.__dict__
    )


def _frozen(base: nn.Linear) -> bool:
    return not any(p is not None and p.requires_grad for p in base._parameters.values())


def _computes_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of a linear layer's output."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
