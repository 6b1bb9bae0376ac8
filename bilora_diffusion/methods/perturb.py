"""Context managers that change weights and restore them exactly, and SAM's ascent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapters import wide_dtype


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Restore the weights bit for bit on exit.

    The context copies the weights, since subtracting the added values would cause a drift in a
    narrow dtype.
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
    """Replace the data of the weights with `values` within the context.

    The original data are not changed.
    """
    # Only the tensors are exchanged, so nothing is copied or rounded.
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

    Afterwards `.grad` holds e instead of g, so e takes no additional memory.

    Args:
        weights: parameters with their gradients in `.grad`; one without a gradient is not moved.
        rho: norm of e over all weights.
    """
    moved_weights: list[Tensor] = []
    gradients: list[Tensor] = []
    for weight in weights:
        if weight.grad is not None:
            moved_weights.append(weight)
            gradients.append(weight.grad)
    # The small number prevents NaN if the gradient is zero.
    torch._foreach_mul_(gradients, rho / (norm(gradients) + 1e-12))
    torch._foreach_add_(moved_weights, gradients)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return sqrt(sum_i ||t_i||^2) in fp32 or wider, 0-d."""
    # The norm of the tensors' norms is the norm of all values.
    return torch.linalg.vector_norm(norms(tensors))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return ||t_i|| of each tensor in fp32 or wider, (tensors,), on the first tensor's device."""
    # One kernel computes the norms of all tensors of a device; the devices may differ.
    each_norm = torch._foreach_norm(list(tensors), dtype=wide_dtype(tensors))
    return torch.stack([norm.to(tensors[0].device) for norm in each_norm])
