"""The largest eigenvalue of the Hessian, by Lanczos (``scipy.sparse.linalg.eigsh``).

"Largest" is algebraic: the steepest upward curvature, not the largest in magnitude, since at a
point that is no minimum a large negative curvature says nothing about sharpness.

Of the libraries for this, hessian-eigenthings 1.0 is an alpha release, PyHessian wants a model, a
criterion and batches of (inputs, targets), and so does curvlinops; SciPy takes any product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import psutil
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilora_diffusion.errors import UserError

from .directions import gaussian
from .profile import Tick, no_tick
from .weights import Loss, Weight, differentiable, terms

LANCZOS_VECTORS = 8
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Eigenvalue:
    """What Lanczos found.

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
    tick: Tick = no_tick,
) -> Eigenvalue:
    """The algebraically largest eigenvalue of the loss's Hessian over all weights together.

    Nothing is moved. Lanczos keeps ``vectors`` vectors of the size of the space in memory.

    Args:
        weights: of the space.
        loss: see ``weights.Loss``; must be twice differentiable.
        tolerance: relative accuracy at which Lanczos stops.
        max_restarts: implicit restarts before it gives up.
        vectors: size of the Lanczos basis.
        seed: of the start vector.
        tick: called after each product.

    Raises:
        UserError: the Lanczos basis does not fit into memory.
    """
    sizes = [weight.tensor.numel() for weight in weights]
    count, kind = sum(sizes), _numpy_dtype(weights)
    vectors = min(vectors, count)
    _check_memory(count, vectors, kind)
    products, largest = 0, 0.0

    def multiply(values: np.ndarray) -> np.ndarray:
        nonlocal products, largest
        parts = _split(values.astype(kind).reshape(-1), weights, sizes)
        found = _joined(hessian_product(weights, loss, parts), kind)
        products, largest = products + 1, max(largest, float(np.abs(found).max()))
        tick()
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


def _numpy_dtype(weights: Sequence[Weight]) -> type[np.floating[Any]]:
    wide = any(weight.tensor.dtype == torch.float64 for weight in weights)
    return np.float64 if wide else np.float32


def _split(values: np.ndarray, weights: Sequence[Weight], sizes: Sequence[int]) -> list[Tensor]:
    flat = torch.from_numpy(values).split(list(sizes))
    return [
        part.view(weight.tensor.shape).to(weight.tensor)
        for part, weight in zip(flat, weights, strict=True)
    ]


def _joined(parts: Sequence[Tensor], kind: Any) -> np.ndarray:
    return np.concatenate([part.detach().cpu().double().numpy().ravel() for part in parts]).astype(
        kind
    )


def _check_memory(count: int, vectors: int, kind: Any) -> None:
    need = count * vectors * np.dtype(kind).itemsize
    free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"the top eigenvalue over {count / 1e6:.0f} M weights needs {need / 1e9:.0f} GB for"
            f" Lanczos and {free / 1e9:.0f} GB are free: leave --eigenvalue out, or take"
            " --space lora or --full_weights adapted."
        )
