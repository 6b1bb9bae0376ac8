"""Sharpness of a minimum.

SAM sharpness (Foret et al. 2021, https://arxiv.org/abs/2010.01412, Eq. 1; the paper, Eq. 2) is

    max over ||e|| <= rho of L(w + e) - L(w)

by projected gradient ascent, one norm over all weights of the space. And the largest eigenvalue of
the Hessian, by Lanczos (``scipy.sparse.linalg.eigsh``). "Largest" is algebraic: the steepest upward
curvature, not the largest in magnitude, since at a point that is no minimum a large negative
curvature says nothing about sharpness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilora_diffusion.errors import UserError

from .weights import (
    Loss,
    Place,
    Weight,
    differentiable,
    displaceable,
    gaussian,
    loss_and_gradient,
    norm,
    terms,
)

LANCZOS_VECTORS = 8
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Sharpness:
    """Result of the ascent.

    Args:
        value: the highest L(w + e) - L(w) that was found; at least 0, which e = 0 has.
        one_step: the same at e = rho g / ||g||, SAM's own perturbation.
        distance: ||e|| where the value was found.
        gradient_norm: ||g|| at w.
        per_start: the highest value from each start: first e = 0, then random points of the sphere.
    """

    value: float
    one_step: float
    distance: float
    gradient_norm: float
    per_start: list[float]


class _Point(NamedTuple):
    """A displacement, the loss there and its gradient; a height that is not finite is -inf."""

    e: list[Tensor]
    height: float
    gradient: list[Tensor]
    steepness: float  # norm of the gradient; 0 where it leads nowhere


class _Ascent(NamedTuple):
    """Loss at the start, after the first step and at the top; ||e|| there; ||g|| at the start."""

    start: float
    first: float
    top: float
    distance: float
    steepness: float


@dataclass
class _Climber:
    place: Place
    weights: Sequence[Weight]
    loss: Loss
    rho: float

    def look(self, e: list[Tensor]) -> _Point:
        self.place.move((1.0, e))
        height, gradient = loss_and_gradient(self.loss, self.weights)
        steepness = norm(gradient)
        if not math.isfinite(height) or not math.isfinite(steepness):
            return _Point(e, -math.inf, gradient, 0.0)
        return _Point(e, height, gradient, steepness)

    def climb(self, e: list[Tensor], steps: int) -> _Ascent:
        """Take ``steps`` gradients uphill from e.

        A step of length eta along the gradient is projected onto the ball. It is kept if it goes
        up, and eta doubles: on the sphere a long step is one of power iteration, which is where
        the ascent converges fastest. Otherwise eta is halved. A height that is not finite counts
        as no rise.
        """
        at, eta = self.look(e), self.rho
        del e  # two points are in memory at a time, not three
        start, first, steepness = at.height, at.height, at.steepness
        for number in range(steps):
            if not at.steepness:
                break
            candidate = self.look(self.step(at, eta))
            if number == 0:
                first = candidate.height
            if candidate.height > at.height:
                at, eta = candidate, 2 * eta
            else:
                eta /= 2
            del candidate
        return _Ascent(start, first, at.height, norm(at.e), steepness)

    @torch.no_grad()
    def step(self, at: _Point, eta: float) -> list[Tensor]:
        """e + eta g / ||g||, projected onto the ball."""
        factor = eta / at.steepness
        e = [part + slope * factor for part, slope in zip(at.e, at.gradient, strict=True)]
        length = norm(e)
        if length > self.rho:
            for part in e:
                part.mul_(self.rho / length)
        return e


def sharpness(
    weights: Sequence[Weight],
    loss: Loss,
    rho: float,
    *,
    steps: int = 10,
    restarts: int = 0,
    seed: int = 0,
) -> Sharpness:
    """SAM sharpness at the weights, a lower bound that rises with ``steps`` and ``restarts``.

    The first start is e = 0, whose first step is rho g / ||g||; the others are random points of the
    sphere, and needed where the gradient is zero. The weights are bit for bit what they were
    afterwards, also after an exception. Takes the memory of about six copies of the weights.
    """
    with differentiable(weights), displaceable(weights) as place:
        climber = _Climber(place, weights, loss, rho)
        best = origin = climber.climb([torch.zeros_like(w.tensor) for w in weights], steps)
        rises = [origin.top - origin.start]
        for number in range(restarts):
            found = climber.climb(_on_sphere(weights, rho, seed, number), steps)
            rises.append(found.top - origin.start)
            best = max(best, found, key=lambda ascent: ascent.top)
    return Sharpness(
        value=best.top - origin.start,
        one_step=origin.first - origin.start,
        distance=best.distance,
        gradient_norm=origin.steepness,
        per_start=rises,
    )


def _on_sphere(weights: Sequence[Weight], rho: float, seed: int, number: int) -> list[Tensor]:
    e = [gaussian(weight, "sphere", seed, number).to(weight.tensor.dtype) for weight in weights]
    length = norm(e)
    for part in e:
        part.mul_(rho / length)
    return e


@dataclass(frozen=True)
class Eigenvalue:
    """Result of Lanczos.

    Args:
        value: None where it did not converge.
        residual: ||H v - value v|| for the unit vector v; a bound on the error of the value.
        products: Hessian-vector products taken.
    """

    value: float | None
    residual: float | None
    products: int


def hessian_product(
    weights: Sequence[Weight], loss: Loss, vector: Sequence[Tensor]
) -> list[Tensor]:
    """H v by differentiating <gradient, v>; one tensor per weight, zeros where nothing depends.

    The weights must require gradients. Attention runs as plain matrix products, since the fused
    kernels have no second derivative.
    """
    tensors = [weight.tensor for weight in weights]
    product = [torch.zeros_like(tensor) for tensor in tensors]
    with sdpa_kernel([SDPBackend.MATH]):
        for term in terms(loss):
            if not term.requires_grad:
                continue
            slopes = torch.autograd.grad(term, tensors, create_graph=True, allow_unused=True)
            pairs = [
                torch.sum(slope * part)
                for slope, part in zip(slopes, vector, strict=True)
                if slope is not None and slope.requires_grad
            ]
            if not pairs:
                continue  # the term is linear in all weights
            found = torch.autograd.grad(torch.stack(pairs).sum(), tensors, allow_unused=True)
            for own, part in zip(product, found, strict=True):
                if part is not None:
                    own.add_(part)
    return product


def top_eigenvalue(
    weights: Sequence[Weight],
    loss: Loss,
    *,
    tolerance: float = TOLERANCE,
    max_restarts: int = 20,
    vectors: int = LANCZOS_VECTORS,
    seed: int = 0,
) -> Eigenvalue:
    """The algebraically largest eigenvalue of the loss's Hessian over all weights together.

    Nothing is moved. Lanczos keeps ``vectors`` vectors of the size of the space in memory.
    """
    sizes = [weight.tensor.numel() for weight in weights]
    count, wide = sum(sizes), any(weight.tensor.dtype == torch.float64 for weight in weights)
    kind = np.float64 if wide else np.float32
    vectors = min(vectors, count)
    _check_memory(count, vectors, kind)
    products, largest = 0, 0.0

    def multiply(values: np.ndarray) -> np.ndarray:
        nonlocal products, largest
        flat = torch.from_numpy(values.astype(kind).reshape(-1)).split(sizes)
        pairs = zip(flat, (weight.tensor for weight in weights), strict=True)
        parts = [part.view(tensor.shape).to(tensor) for part, tensor in pairs]
        found = _joined(hessian_product(weights, loss, parts), kind)
        products, largest = products + 1, max(largest, float(np.abs(found).max()))
        return found

    with differentiable(weights):
        start = _joined([gaussian(weight, "lanczos", seed) for weight in weights], kind)
        if count == 1:  # Lanczos needs a space of two dimensions
            return Eigenvalue(float(multiply(np.ones(1, kind))[0]), 0.0, products)
        # SciPy's annotations know neither the keywords of the operator nor fractions as tolerance.
        operator = cast(Any, LinearOperator)((count, count), matvec=multiply, dtype=kind)
        try:
            values, found = cast(Any, eigsh)(
                operator,
                k=1,
                which="LA",
                v0=start,
                ncv=vectors,
                tol=tolerance,
                maxiter=max_restarts,
            )
        except ArpackNoConvergence:
            return Eigenvalue(None, None, products)
        except ArpackError:
            if largest == 0:  # a linear loss, of which ARPACK finds no direction to start in
                return Eigenvalue(0.0, 0.0, products)
            raise
        unit = found[:, 0]
        residual = float(np.linalg.norm(multiply(unit) - values[0] * unit))
    return Eigenvalue(float(values[0]), residual, products)


def _joined(parts: Sequence[Tensor], kind: Any) -> np.ndarray:
    flat = [part.detach().cpu().double().numpy().ravel() for part in parts]
    return np.concatenate(flat).astype(kind)


def _check_memory(count: int, vectors: int, kind: Any) -> None:
    need = count * vectors * np.dtype(kind).itemsize
    free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"the top eigenvalue over {count / 1e6:.0f} M weights needs {need / 1e9:.0f} GB for"
            f" Lanczos and {free / 1e9:.0f} GB are free: leave --eigenvalue out, or take"
            " --space lora or --full_weights adapted."
        )
