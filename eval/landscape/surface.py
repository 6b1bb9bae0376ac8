"""The loss around some weights: along random directions, on the plane of two directions, and the
largest loss within a ball (SAM sharpness).

The functions work with any model: ``weights`` is a list of tensors, and ``loss`` is a function
without arguments that reads these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bilora_diffusion.core.seeds import generator
from bilora_diffusion.methods.perturb import replaced

# Yields the terms of the loss as 0-d tensors, so that only one term's graph is in memory at a time
Loss = Callable[[], Iterable[Tensor]]


class Weight(NamedTuple):
    """One weight tensor around which the loss is measured.

    ``filter_dim`` is the dimension that indexes the filters: 0 if a filter is a row (an output of a
    linear layer or a convolution), 1 if a filter is a column.
    """

    name: str
    tensor: Tensor
    filter_dim: int = 0


@torch.no_grad()
def evaluate(loss: Loss) -> float:
    """Return the loss as a number; its terms are added in double precision."""
    return sum(float(term) for term in loss())


def loss_and_gradient(loss: Loss, weights: Sequence[Weight]) -> tuple[float, list[Tensor]]:
    """Return the loss and its gradient, which is a tensor for each weight.

    The gradient is zero for a weight that the loss does not depend on. The weights must require
    gradients; see :func:`differentiable`. Their ``.grad`` is not changed.
    """
    tensors = [weight.tensor for weight in weights]
    total = 0.0
    gradient = [torch.zeros_like(tensor) for tensor in tensors]
    for term in loss():
        # Differentiate each term separately: only one term's graph is in memory.
        total += float(term.detach())
        if not term.requires_grad:
            continue
        slopes = torch.autograd.grad(term, tensors, allow_unused=True)
        for total_slope, slope in zip(gradient, slopes, strict=True):
            if slope is not None:
                total_slope.add_(slope)
    return total, gradient


@contextmanager
def differentiable(weights: Sequence[Weight]) -> Iterator[None]:
    """Context manager: make the weights require gradients, and restore their flags on exit."""
    flags = [weight.tensor.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.tensor.requires_grad_(flag)


@contextmanager
def displaceable(weights: Sequence[Weight]) -> Iterator[Callable[..., None]]:
    """Context manager: replace the weights with copies that the yielded function moves.

    ``move((t, d), ...)`` sets the copies to w + sum of t d, where a direction d has a tensor for
    each weight. The original memory is not changed, so the weights are restored bit for bit on
    exit, even after an exception.
    """
    originals = [weight.tensor.data for weight in weights]
    copies = [tensor.clone() for tensor in originals]

    @torch.no_grad()
    def move(*displacements: tuple[float, Iterable[Tensor]]) -> None:
        # Start from the originals each time, so that rounding errors do not accumulate.
        for copy, original in zip(copies, originals, strict=True):
            copy.copy_(original)
        for factor, direction in displacements:
            if factor == 0:
                continue
            for copy, part in zip(copies, direction, strict=True):
                copy.add_(part.to(copy), alpha=factor)

    with replaced(cast(Any, [weight.tensor for weight in weights]), copies):
        yield move


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm over all tensors, computed in fp32 or wider."""
    norms = []
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        # On the CPU, since a model may be on several devices.
        norms.append(torch.linalg.vector_norm(tensor, dtype=wide).double().cpu())
    return float(torch.linalg.vector_norm(torch.stack(norms)))


# Normalized random directions (Li et al. 2018, https://arxiv.org/abs/1712.09913, Section 4) have
# standard normal entries, and each filter is scaled to the norm of the same filter of the weights:
#
#     d_ij <- d_ij / ||d_ij|| * ||w_ij||
#
# A step of length t therefore moves every filter by t times its norm, whatever its scale. A filter
# of zeros is not moved. The normal entries depend only on (seed, number, name and shape of the
# weight), so they are the same for runs with the same layers and ranks.

# Maximum number of entries of a direction that is kept in memory; a larger direction is computed
# again for each use, one weight at a time
CACHED_NUMBERS = 2**28


def filter_normalized(direction: Tensor, weight: Tensor, filter_dim: int = 0) -> Tensor:
    """Return ``direction`` with the norm of each filter set to the norm of ``weight``'s filter."""
    # The norm of a filter is over all dimensions except the one that indexes the filters.
    summed = tuple(dim for dim in range(weight.dim()) if dim != filter_dim)
    wide = torch.promote_types(weight.dtype, torch.float32)
    # (1, .., filters, .., 1)
    norms = torch.linalg.vector_norm(weight, dim=summed, keepdim=True, dtype=wide)
    lengths = torch.linalg.vector_norm(direction, dim=summed, keepdim=True, dtype=wide)
    return direction * (norms / lengths.clamp_min(torch.finfo(wide).tiny))


def gaussian(weight: Weight, *key: int | str) -> Tensor:
    """Return standard normal entries with the shape and device of a weight.

    The seed is computed from the key and the weight's name.
    """
    tensor = weight.tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    random = generator("landscape", *key, weight.name)
    # Generated on the CPU, so that all devices get the same entries.
    return torch.randn(tensor.shape, generator=random, dtype=wide).to(tensor.device)


class Direction:
    """A normalized random direction; iteration yields its tensor for each weight.

    Create a direction outside of `displaceable`, while the weights have their original values.

    Args:
        weights: weights of the space.
        seed: seed of all directions.
        number: number of this direction.
    """

    def __init__(self, weights: Sequence[Weight], seed: int, number: int) -> None:
        # `.data` keeps the original values: inside `displaceable`, the weights are displaced
        # copies.
        self._weights = [weight._replace(tensor=weight.tensor.data) for weight in weights]
        self._key = (seed, number)
        numbers = sum(weight.tensor.numel() for weight in weights)
        self._cached = list(self._parts()) if numbers <= CACHED_NUMBERS else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._cached or self._parts())

    @torch.no_grad()
    def _parts(self) -> Iterator[Tensor]:
        for weight in self._weights:
            noise = gaussian(weight, *self._key)
            yield filter_normalized(noise, weight.tensor, weight.filter_dim)


def coordinates(radius: float, points: int) -> list[float]:
    """Return ``points`` evenly spaced numbers from -radius to radius; the middle is exactly 0."""
    half = points // 2  # the number of points is odd
    return [radius * (index - half) / half for index in range(points)]


def line(
    weights: Sequence[Weight],
    loss: Loss,
    direction: Iterable[Tensor],
    positions: Sequence[float],
    offset: Sequence[tuple[float, Iterable[Tensor]]] = (),
) -> list[float]:
    """Return the loss at w + t d for each position t, or at w + s d' + t d with an offset (s, d').

    The weights are restored bit for bit, even after an exception.
    """
    losses = []
    with displaceable(weights) as move:
        for position in positions:
            move(*offset, (position, direction))
            losses.append(evaluate(loss))
    return losses


def plane(
    weights: Sequence[Weight],
    loss: Loss,
    directions: tuple[Iterable[Tensor], Iterable[Tensor]],
    positions: Sequence[float],
) -> list[list[float]]:
    """Return the loss at w + s d1 + t d2 for each position s (rows) and t (columns)."""
    first, second = directions
    return [line(weights, loss, second, positions, [(s, first)]) for s in positions]


# SAM sharpness of a minimum,
#
#     max over ||e|| <= rho of L(w + e) - L(w)
#
# (Foret et al. 2021, https://arxiv.org/abs/2010.01412, Eq. 1; the paper, Eq. 2), by projected
# gradient ascent, with one norm over all weights of the space.


class _Displaced(NamedTuple):
    """A displacement e, the loss at w + e, and its gradient."""

    e: list[Tensor]
    loss: float  # -inf if the loss or the gradient is not finite
    gradient: list[Tensor]
    steepness: float  # norm of the gradient; 0 if the loss or the gradient is not finite


def sharpness(weights: Sequence[Weight], loss: Loss, rho: float, steps: int = 10) -> float:
    """Return the SAM sharpness at the weights, as a lower bound.

    The result is at least 0, and never decreases with more ``steps``. It is NaN if the loss or the
    gradient at the weights is not finite.

    The first step is SAM's perturbation, rho g / ||g||. Each step has the length eta, follows the
    gradient and is projected onto the ball. If the loss rises, the step is accepted and eta is
    doubled; otherwise eta is halved. With a large eta, the step is projected back onto the sphere
    and amounts to a step of power iteration, which converges fastest. A loss that is not finite
    does not count as a rise.

    The weights are restored bit for bit, even after an exception. The function needs the memory of
    about six copies of the weights.
    """
    with differentiable(weights), displaceable(weights) as move:

        def evaluate_at(e: list[Tensor]) -> _Displaced:
            move((1.0, e))
            value, gradient = loss_and_gradient(loss, weights)
            steepness = norm(gradient)
            if not math.isfinite(value) or not math.isfinite(steepness):
                return _Displaced(e, -math.inf, gradient, 0.0)
            return _Displaced(e, value, gradient, steepness)

        current = evaluate_at([torch.zeros_like(weight.tensor) for weight in weights])
        start_loss = current.loss
        eta = rho
        for _ in range(steps):
            if current.steepness == 0:
                break  # a stationary point, or a loss that is not finite
            candidate = evaluate_at(_step(current, eta, rho))
            if candidate.loss > current.loss:
                current = candidate
                eta *= 2  # eta may exceed rho: the projection keeps the result in the ball
            else:
                eta /= 2
            del candidate  # at most two displacements are in memory, not three
        return current.loss - start_loss


@torch.no_grad()
def _step(current: _Displaced, eta: float, rho: float) -> list[Tensor]:
    """Return e + eta g / ||g||, projected onto the ball of radius rho."""
    factor = eta / current.steepness
    e = [part + slope * factor for part, slope in zip(current.e, current.gradient, strict=True)]
    length = norm(e)
    if length > rho:  # back onto the sphere
        for part in e:
            part.mul_(rho / length)
    return e
