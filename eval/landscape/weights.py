"""The point of a loss landscape: some weights of a model, and a loss that reads them.

Everything here works on any model: ``weights`` is a list of tensors and ``loss`` a function without
arguments that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bilora_diffusion.methods.perturb import replaced

Loss = Callable[[], "float | Tensor | Iterable[Tensor]"]
"""A number, or the 0-d tensors that add up to it. Where they come one by one (a generator), only
one term's graph is in memory at a time."""


class Weight(NamedTuple):
    """One tensor of the space that is looked at.

    ``filter_dim`` is the dimension whose entries are filters: 0 where a filter is a row (an output
    of a linear layer or of a convolution), 1 where it is a column.
    """

    name: str
    tensor: Tensor
    filter_dim: int = 0


def terms(loss: Loss) -> Iterator[Tensor]:
    """The terms of a loss, one by one, each a 0-d tensor."""
    value = loss()
    if isinstance(value, int | float):
        yield torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Tensor):
        yield value
    else:
        yield from value


@torch.no_grad()
def evaluate(loss: Loss) -> float:
    """The loss as a number, its terms added in double precision."""
    return float(sum(float(term) for term in terms(loss)))


def loss_and_gradient(loss: Loss, weights: Sequence[Weight]) -> tuple[float, list[Tensor]]:
    """The loss and its gradient, one tensor per weight; zeros where the loss does not depend on it.

    The weights must require gradients; see :func:`differentiable`. Their ``.grad`` is not touched.
    """
    tensors = [weight.tensor for weight in weights]
    total, gradient = 0.0, [torch.zeros_like(tensor) for tensor in tensors]
    for term in terms(loss):
        total += float(term.detach())
        if not term.requires_grad:
            continue
        found = torch.autograd.grad(term, tensors, allow_unused=True)
        for own, part in zip(gradient, found, strict=True):
            if part is not None:
                own.add_(part)
    return total, gradient


@contextmanager
def differentiable(weights: Sequence[Weight]) -> Iterator[None]:
    """Within the context the weights require gradients; afterwards as before."""
    before = [weight.tensor.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.tensor.requires_grad_(flag)


@contextmanager
def displaceable(weights: Sequence[Weight]) -> Iterator[Place]:
    """Within the context the weights are copies that :class:`Place` moves; their own memory is not
    touched, so afterwards they are bit for bit what they were, also after an exception.
    """
    own = [weight.tensor.data for weight in weights]
    copies = [tensor.clone() for tensor in own]
    parameters = cast(Any, [weight.tensor for weight in weights])
    with replaced(parameters, copies):
        yield Place(own, copies)


class Place:
    """Where the weights are: their own values plus a displacement.

    Args:
        own: the weights' own values, never written.
        copies: what the model reads now.
    """

    def __init__(self, own: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self.own, self.copies = own, copies

    @torch.no_grad()
    def move(self, *displacements: tuple[float, Iterable[Tensor]]) -> None:
        """Put the weights at w + sum of t * d over the pairs (t, d); d has a tensor per weight."""
        for own, copy in zip(self.own, self.copies, strict=True):
            copy.copy_(own)
        for factor, direction in displacements:
            if factor == 0:
                continue
            for copy, part in zip(self.copies, direction, strict=True):
                copy.add_(part.to(copy), alpha=factor)


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all tensors together, in fp32 or wider."""
    squares = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double()
        for t in tensors
    ]
    return float(torch.linalg.vector_norm(torch.stack([s.cpu() for s in squares])))
