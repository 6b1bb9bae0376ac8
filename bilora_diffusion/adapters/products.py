"""Products of adapters' factors as autograd functions with hand-written gradients.

The A and B of all adapters are joined into one A and one B, so a single product replaces PEFT's
product for each adapter. `fused` decides which layers use these functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class AdapterProduct(torch.autograd.Function):
    """The product y + s x A^T B^T, where y is given or is x W^T + b.

    A, (R, in), and B, (out, R), are joined from all adapters; R is the sum of the ranks.

    The joined B is stored as B^T, (R, out), and so is its gradient: on a CPU, a product with the
    narrow matrix (out, R) takes two to four times as long. The factors of each trained adapter get
    their own gradients, in their own precision. Frozen adapters come last, and their factors get no
    gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        scales: list[float],
        *factors: Tensor,
    ) -> Tensor:
        ctx.scale = scales[0]  # `_join` multiplies B by the other scales' ratios to this one
        A, B_transposed = _join(ctx, factors, scales, x.dtype)
        inputs = x.reshape(-1, x.shape[-1])  # (tokens, in)
        hidden = (inputs @ A.mT).mul_(ctx.scale)  # (tokens, R)
        if weight is not None:
            result = F.linear(inputs, weight, bias)  # (tokens, out)
        else:
            # A copy, since an autograd function must not change its inputs.
            result = output.reshape(-1, output.shape[-1]).contiguous().clone()
        result.addmm_(hidden, B_transposed)
        ctx.save_for_backward(inputs, weight, A, B_transposed, hidden)
        ctx.shape = x.shape
        return result.view(x.shape[:-1] + result.shape[-1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, weight, A, B_transposed, hidden = ctx.saved_tensors
        g_output = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
        g_hidden = (g_output @ B_transposed.mT).mul_(ctx.scale)  # (tokens, R)
        g_x = None
        if ctx.needs_input_grad[0]:
            if weight is not None:
                g_x = (g_output @ weight).addmm_(g_hidden, A).view(ctx.shape)
            else:
                g_x = (g_hidden @ A).view(ctx.shape)  # autograd adds the base's part from `g_base`
        rows = slice(_trained_rows(ctx))
        g_A = g_hidden[:, rows].mT @ inputs  # (trained rows, in)
        # (trained rows, out); `hidden` includes the scale
        g_B_transposed = hidden[:, rows].mT @ g_output
        g_base = gradient if ctx.needs_input_grad[1] else None
        # In the order of forward's arguments; weight, bias and scales get no gradients.
        gradients = [g_x, g_base, None, None, None]
        gradients += _separate(ctx, g_A, g_B_transposed)
        return tuple(gradients)


class AdapterConvolution(torch.autograd.Function):
    """The sum y + s B * (A * x) for a given y, where * is a convolution.

    A is (R, channels, height, width) and B is (out, R, 1, 1).
    """

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
        ctx.stride = stride
        ctx.padding = padding
        # (samples, out, height', width')
        return torch.add(output, F.conv2d(hidden, B), alpha=ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, A, B, hidden = ctx.saved_tensors
        g_hidden, g_B = _convolution_gradients(gradient, hidden, B, (1, 1), (0, 0), True)
        g_hidden.mul_(ctx.scale)
        g_B.mul_(ctx.scale)  # `hidden` does not include the scale here
        g_x, g_A = _convolution_gradients(
            g_hidden, x, A, ctx.stride, ctx.padding, ctx.needs_input_grad[0]
        )
        # Frozen adapters are computed too: one convolution for all is as fast as one for some.
        rows = slice(_trained_rows(ctx))
        g_A = g_A[rows]
        g_B = g_B[:, rows]
        g_base = gradient if ctx.needs_input_grad[1] else None
        gradients = [g_x, g_base, None, None, None]  # stride, padding and scales get no gradients
        gradients += _separate(ctx, g_A, g_B.transpose(0, 1))
        return tuple(gradients)


def _convolution_gradients(
    gradient: Tensor, inputs: Tensor, weight: Tensor, stride: Any, padding: Any, with_inputs: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution's input (None unless `with_inputs`) and weight."""
    g_inputs, g_weight, _ = torch.ops.aten.convolution_backward(
        gradient,
        inputs,
        weight,
        None,  # shape of the bias
        stride,
        padding,
        (1, 1),  # dilation
        False,  # transposed
        (0, 0),  # output padding
        1,  # groups
        (with_inputs, True, False),  # whether to compute the gradients of input, weight, bias
    )
    return g_inputs, g_weight


def _join(
    ctx: Any, factors: tuple[Tensor, ...], scales: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Join A1, B1, A2, B2, ... into [A1; A2; ...], (R, in), and [B1, B2 s2 / s1, ...]^T, (R, out).

    The ranks and the ratios of the scales are stored in `ctx` for `_separate`.
    """
    A_parts = list(factors[::2])  # (rank, in) each; (rank, in, height, width) for a convolution
    B_parts = [B.transpose(0, 1) for B in factors[1::2]]  # (rank, out) each
    ctx.ranks = [len(A) for A in A_parts]
    ctx.ratios = None
    if scales.count(scales[0]) < len(scales):
        # s1 B1 A1 + s2 B2 A2 = s1 [B1, B2 s2 / s1] [A1; A2]
        ctx.ratios = [scale / scales[0] for scale in scales]
        B_parts = [B * ratio for B, ratio in zip(B_parts, ctx.ratios, strict=True)]
    A = A_parts[0]
    B_transposed = B_parts[0]
    if len(A_parts) > 1:
        A = torch.cat(A_parts)
        B_transposed = torch.cat(B_parts)
    return A.to(dtype), B_transposed.to(dtype, memory_format=torch.contiguous_format)


def _separate(ctx: Any, g_A: Tensor, g_B_transposed: Tensor) -> list[Tensor | None]:
    """Split the gradients of the joined factors into those of A1, B1, A2, B2, ...

    Frozen adapters, which have no rows in `g_A` and `g_B_transposed`, get None.
    """
    trained = _trained_adapters(ctx)
    A_parts = [g_A]
    B_parts = [g_B_transposed]
    if trained > 1:
        A_parts = list(g_A.split(ctx.ranks[:trained]))
        B_parts = list(g_B_transposed.split(ctx.ranks[:trained]))
    if ctx.ratios is not None:
        ratios = ctx.ratios[: len(B_parts)]
        B_parts = [B * ratio for B, ratio in zip(B_parts, ratios, strict=True)]
    gradients: list[Tensor | None] = []
    if trained:
        for A, B_transposed in zip(A_parts, B_parts, strict=True):
            gradients += A, B_transposed.transpose(0, 1).contiguous()
    gradients += [None] * 2 * (len(ctx.ranks) - trained)
    return gradients


def _trained_adapters(ctx: Any) -> int:
    """Return the number of adapters up to the last one whose factors need a gradient."""
    needs_gradient = ctx.needs_input_grad[5:]  # for A1, B1, A2, B2, ...
    trained = 0
    for number in range(len(ctx.ranks)):
        if any(needs_gradient[2 * number : 2 * number + 2]):
            trained = number + 1
    return trained


def _trained_rows(ctx: Any) -> int:
    """Return the number of rows of the joined A that belong to trained adapters."""
    return sum(ctx.ranks[: _trained_adapters(ctx)])
