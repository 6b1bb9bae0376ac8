"""Contexts that move weights and restore them exactly, and SAM's move uphill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapters import wide_dtype


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Restore the weights, bit for bit, when the context is left.

    It takes a copy of them: to subtract what was added would drift in a narrow dtype.
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
    """Let the weights hold `values` within the context; their own data are not changed."""
    # The tensors are exchanged, so that nothing is copied or rounded.
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
    """Add e = rho g / ||g|| in place, with one norm over all weights (Equations 3 and 4).

    Afterwards `.grad` holds e in place of g, so that it takes no memory.

    Args:
        weights: parameters with their gradients in `.grad`; one without a gradient is not moved.
        rho: length of the step, over all weights together.
    """
    moved_weights: list[Tensor] = []
    gradients: list[Tensor] = []
    for weight in weights:
        if weight.grad is not None:
            moved_weights.append(weight)
            gradients.append(weight.grad)
    # The small number keeps a zero gradient from becoming NaN.
    torch._foreach_mul_(gradients, rho / (norm(gradients) + 1e-12))
    torch._foreach_add_(moved_weights, gradients)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """sqrt(sum_i ||t_i||^2) in fp32 or wider, 0-d."""
    # The norm of the tensors' norms is that of all values.
    return torch.linalg.vector_norm(norms(tensors))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """||t_i|| of each tensor in fp32 or wider, (tensors,), on the first one's device."""
    # It takes one kernel for all tensors of a device; they may be on several.
    each_norm = torch._foreach_norm(list(tensors), dtype=wide_dtype(tensors))
    return torch.stack([norm.to(tensors[0].device) for norm in each_norm])
