"""The point of a loss landscape: some weights of a model, and a loss that reads them; random
directions from there, and the loss along one and on the plane of two.

Everything here works on any model: ``weights`` is a list of tensors and ``loss`` a function without
arguments that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bilora_diffusion.core.seeds import generator
from bilora_diffusion.methods.perturb import replaced

Loss = Callable[[], Iterable[Tensor]]
"""The 0-d tensors that add up to it. They come one by one (a generator), so that only one term's
graph is in memory at a time."""


class Weight(NamedTuple):
    """One tensor of the space that is looked at.

    ``filter_dim`` is the dimension whose entries are filters: 0 where a filter is a row (an output
    of a linear layer or of a convolution), 1 where it is a column.
    """

    name: str
    tensor: Tensor
    filter_dim: int = 0


@torch.no_grad()
def evaluate(loss: Loss) -> float:
    """The loss as a number, its terms added in double precision."""
    return sum(float(term) for term in loss())


def loss_and_gradient(loss: Loss, weights: Sequence[Weight]) -> tuple[float, list[Tensor]]:
    """The loss and its gradient, one tensor per weight; zeros where the loss does not depend on it.

    The weights must require gradients; see :func:`differentiable`. Their ``.grad`` is not touched.
    """
    tensors = [weight.tensor for weight in weights]
    total, gradient = 0.0, [torch.zeros_like(tensor) for tensor in tensors]
    for term in loss():
        total += float(term.detach())
        if not term.requires_grad:
            continue
        slopes = torch.autograd.grad(term, tensors, allow_unused=True)
        for own, part in zip(gradient, slopes, strict=True):
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
def displaceable(weights: Sequence[Weight]) -> Iterator[Callable[..., None]]:
    """Within the context the weights are copies that ``move((t, d), ...)`` puts at w + sum of t d,
    d with a tensor per weight; their own memory is not touched, so afterwards they are bit for bit
    what they were, also after an exception.
    """
    own = [weight.tensor.data for weight in weights]
    copies = [tensor.clone() for tensor in own]

    @torch.no_grad()
    def move(*displacements: tuple[float, Iterable[Tensor]]) -> None:
        for copy, tensor in zip(copies, own, strict=True):
            copy.copy_(tensor)
        for factor, direction in displacements:
            for copy, part in zip(copies, direction, strict=True) if factor else ():
                copy.add_(part.to(copy), alpha=factor)

    with replaced(cast(Any, [weight.tensor for weight in weights]), copies):
        yield move


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all tensors together, in fp32 or wider."""
    squares = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double()
        for t in tensors
    ]
    return float(torch.linalg.vector_norm(torch.stack([s.cpu() for s in squares])))


# Normalized random directions (Li et al. 2018, https://arxiv.org/abs/1712.09913, Section 4) have
# standard normal entries, and each filter is scaled to the norm of the weights' own filter:
#
#     d_ij <- d_ij / ||d_ij|| * ||w_ij||
#
# so that a step of length t moves every filter by t times its norm, whatever its scale. A filter of
# zeros stays where it is. Directions depend on (seed, number, name of the weight) alone, so every
# run is looked at along the same ones.

KEPT_NUMBERS = 2**28
"""A direction of up to so many entries is kept; a larger one is drawn anew whenever it is used, one
layer's part at a time."""


def filter_normalized(direction: Tensor, weight: Tensor, filter_dim: int = 0) -> Tensor:
    """``direction`` with the norm of each filter set to that of ``weight``'s filter."""
    rest = tuple(dim for dim in range(weight.dim()) if dim != filter_dim)
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weight, dim=rest, keepdim=True, dtype=wide)
    lengths = torch.linalg.vector_norm(direction, dim=rest, keepdim=True, dtype=wide)
    return direction * (norms / lengths.clamp_min(torch.finfo(wide).tiny))


def gaussian(weight: Weight, *key: int | str) -> Tensor:
    """Standard normal entries in the shape and on the device of a weight, seeded by the key."""
    own = weight.tensor
    wide = torch.promote_types(own.dtype, torch.float32)
    random = generator("landscape", *key, weight.name)
    return torch.randn(own.shape, generator=random, dtype=wide).to(own.device)


class Direction:
    """One normalized random direction; iterating gives a tensor per weight, layer by layer.

    Make it while the weights are at their own values.

    Args:
        weights: of the space.
        seed, number: which direction.
    """

    def __init__(self, weights: Sequence[Weight], seed: int, number: int) -> None:
        # The values of now: within `displaceable` the weights hold displaced copies.
        self._weights = [weight._replace(tensor=weight.tensor.data) for weight in weights]
        self._key = (seed, number)
        small = sum(weight.tensor.numel() for weight in weights) <= KEPT_NUMBERS
        self._kept = list(self._drawn()) if small else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept or self._drawn())

    @torch.no_grad()
    def _drawn(self) -> Iterator[Tensor]:
        for weight in self._weights:
            noise = gaussian(weight, *self._key)
            yield filter_normalized(noise, weight.tensor, weight.filter_dim)


def coordinates(radius: float, points: int) -> list[float]:
    """``points`` evenly spaced numbers from -radius to radius, the middle one exactly 0."""
    half = points // 2
    return [radius * (index - half) / half for index in range(points)]


def line(
    weights: Sequence[Weight],
    loss: Loss,
    direction: Iterable[Tensor],
    positions: Sequence[float],
    aside: Sequence[tuple[float, Iterable[Tensor]]] = (),
) -> list[float]:
    """The loss at w + t d for each position t, or at so much beside it.

    The weights are bit for bit what they were afterwards, also after an exception.
    """
    losses = []
    with displaceable(weights) as move:
        for position in positions:
            move(*aside, (position, direction))
            losses.append(evaluate(loss))
    return losses


def plane(
    weights: Sequence[Weight],
    loss: Loss,
    directions: tuple[Iterable[Tensor], Iterable[Tensor]],
    positions: Sequence[float],
) -> list[list[float]]:
    """The loss at w + s d1 + t d2; row s, column t, each over the positions."""
    first, second = directions
    return [line(weights, loss, second, positions, [(s, first)]) for s in positions]
