"""Weights that are moved for a moment and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """After the context the weights are bit for bit what they were: by copy, never by subtraction,
    which would drift in a narrow dtype. Takes one copy of them.
    """
    with torch.no_grad():
        kept = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


@contextmanager
def replaced(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the context the weights hold `values`; their own are not touched, so not rounded."""
    own = [weight.data for weight in weights]
    try:
        for weight, value in zip(weights, values, strict=True):
            weight.data = value
        yield
    finally:
        for weight, value in zip(weights, own, strict=True):
            weight.data = value


@torch.no_grad()
def climb_(weights: Sequence[Tensor], rho: float) -> Tensor:
    """Equation 3 and 4's step, in place: add e = rho g / ||g||, one norm over all weights.

    The gradients are consumed: `.grad` holds e afterwards, so that no memory is taken.

    Args:
        weights: parameters with their gradients in `.grad`; those without one are left alone.
        rho: length of the step, over all weights together.

    Returns:
        ||g||, a 0-d tensor.
    """
    moved = [weight for weight in weights if weight.grad is not None]
    gradients = [weight.grad for weight in moved if weight.grad is not None]
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g, dtype=_wide(g)) for g in gradients])
    )
    torch._foreach_mul_(gradients, [(rho / (norm + 1e-12)).to(g.dtype) for g in gradients])
    torch._foreach_add_(moved, gradients)
    return norm


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
