"""Linear layers whose frozen weight is held in 8 bits, as integers or as floats.

Only the weight is rounded; products and gradients are those of the rounded weight, exactly, which
is what adapters are to be trained on. bitsandbytes' 8-bit layer rounds what enters a layer too, and
with diffusers' layerwise casting autograd keeps a wide copy of each weight until backward. Nothing
but PyTorch's own types is needed, so it works on a CPU too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The type that weights are held in, and its largest number."""


class NarrowLinear(nn.Linear):
    """y = W x + b, W the codes (m, n) times a scale for each row, in 8 bits a weight and 32 a row.

    Codes are held as bytes: processes cannot send each other 8-bit floats (gloo refuses them), and
    ``to(dtype)`` would widen them.

    Args:
        layer: whose weight is rounded; its bias is taken over.
        kind: one of `KINDS`.
        compute_dtype: of W, and so of the product.
        device: where it stays; None is where it is.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        layer: nn.Linear,
        kind: str,
        compute_dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)  # a linear layer's own would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = compute_dtype
        weight = layer.weight.detach().to(device or layer.weight.device)
        dtype, most = KINDS[kind]
        self.dtype = dtype
        codes, scales = _rounded(weight.float(), dtype, most)
        self.register_buffer("codes", codes.view(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = layer.bias
        if self.bias is not None:
            self.bias.data = self.bias.detach().to(weight.device)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W, made anew whenever it is asked for."""
        return (self.codes.view(self.dtype).float() * self.scales).to(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return _Product.apply(input, self.codes.view(self.dtype), self.scales, bias)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """The weight is made in forward and again in backward, and kept in between by nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, (codes.float() * scales).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, scales = ctx.saved_tensors
        return gradient @ (codes.float() * scales).to(gradient.dtype), None, None, None


def _rounded(weight: Tensor, dtype: torch.dtype, most: float) -> tuple[Tensor, Tensor]:
    """Codes and scales with which the largest weight of each row is the largest number."""
    scales = weight.abs().amax(1, keepdim=True) / most
    scales = torch.where(scales > 0, scales, 1.0)
    codes = weight / scales
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales
