"""Weights that are moved for a moment and put back exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """After the context the weights are bit for bit what they were: by copy, never by subtraction,
    which would drift in a narrow dtype. Takes one copy of them.
    """
    if not weights:
        yield
        return
    with torch.no_grad():
        copies = torch._foreach_clone(list(weights))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), copies)


@contextmanager
def replaced(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the context the weights hold `values`; their own are not touched, so not rounded."""
    # Tensors are exchanged, so neither the weights nor the values are copied.
    originals = [weight.data for weight in weights]
    try:
        for weight, value in zip(weights, values, strict=True):
            weight.data = value
        yield
    finally:
        for weight, value in zip(weights, originals, strict=True):
            weight.data = value


@torch.no_grad()
def climb_(weights: Sequence[Tensor], rho: float) -> None:
    """Equation 3 and 4's step, in place: add e = rho g / ||g||, one norm over all weights.

    The gradients are consumed: `.grad` holds e afterwards, so that no memory is taken.

    Args:
        weights: parameters with their gradients in `.grad`; those without one are left alone.
        rho: length of the step, over all weights together.
    """
    with_gradient, gradients = list[Tensor](), list[Tensor]()
    for weight in weights:
        if weight.grad is not None:
            with_gradient.append(weight)
            gradients.append(weight.grad)
    # e in place of g; the small number keeps a zero gradient from becoming NaN.
    torch._foreach_mul_(gradients, rho / (norm(gradients) + 1e-12))
    torch._foreach_add_(with_gradient, gradients)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """sqrt(sum_i ||t_i||^2) in fp32 or wider, 0-d."""
    # The norm of the norms is that of all values.
    norms = torch._foreach_norm(list(tensors), dtype=_wide_dtype(tensors))
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """sum_i <left_i, right_i> in fp32 or wider, 0-d."""
    dtype = _wide_dtype(left)
    flat_left = torch.cat([tensor.flatten() for tensor in left]).to(dtype)
    flat_right = torch.cat([tensor.flatten() for tensor in right]).to(dtype)
    return torch.dot(flat_left, flat_right)


def _wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds all of them, at least fp32."""
    return functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
