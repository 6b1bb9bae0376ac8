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
    moved = [weight for weight in weights if weight.grad is not None]
    gradients = [weight.grad for weight in moved if weight.grad is not None]
    torch._foreach_mul_(gradients, rho / (norm(gradients) + 1e-12))
    torch._foreach_add_(moved, gradients)


@torch.no_grad()
def move_(tensors: Sequence[Tensor], along: Sequence[Tensor], length: float | Tensor) -> None:
    """Add length v / ||v||, one norm over all of v, in place; nothing where v is zero.

    Args:
        tensors: what is moved.
        along: v, a tensor of the same shape for each; left as they are.
        length: of the step over all tensors together; a negative one goes the other way.
    """
    if not along:
        return
    whole = norm(along)
    factor = torch.where(whole > 0, length / whole, 0.0)
    steps = torch._foreach_mul(list(along), [factor.to(v.device, v.dtype) for v in along])
    torch._foreach_add_(list(tensors), steps)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """sqrt(sum_i ||t_i||^2) in fp32 or wider, 0-d."""
    norms = torch._foreach_norm(list(tensors), dtype=_wide(tensors))
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def dot(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """sum_i <t_i, o_i> in fp32 or wider, 0-d."""
    wide = _wide(tensors)
    both = (torch.cat([t.flatten() for t in side]).to(wide) for side in (tensors, others))
    return torch.dot(*both)


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
