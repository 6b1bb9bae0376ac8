"""The ball that bounds the auxiliary: the joint norm of all B @ A, and the projection of Eq. 10.

The products are never formed. With the Gram matrices G_B = B^T B and G_A = A A^T, both (r, r),
||B A||_F^2 = tr(G_B G_A). Layers of the same shape are stacked, so 560 layers need only a few
kernels. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...adapters import Factors, exact_stack, group_equal, local_tensor

# Largest number of elements in a stack. On a CPU, a stack that fits into the cache takes half the
# time. On other devices, few large kernels are best; a stack has at most 128 MiB in float64.
_STACK_ELEMENTS_ON_CPU = 2**18
_STACK_ELEMENTS_ELSEWHERE = 2**24


class Projection(NamedTuple):
    """The outcome of a projection: 0-d tensors in `exact_dtype` on the first factors' device."""

    before: Tensor  # norm before the projection
    after: Tensor  # norm after the projection
    factor: Tensor  # multiplier of every A and B; 1 inside the ball


@torch.no_grad()
def frobenius_norm(factors: Sequence[Factors]) -> Tensor:
    """Compute sqrt(sum_i ||s_i B_i A_i||_F^2), where s_i is layer i's `Factors.scale`.

    Args:
        factors: A (r, n) and B (m, r) of each layer; shapes, dtypes and devices may differ.

    Returns:
        0-d tensor in `exact_dtype` on the first layer's device.

    Raises:
        ValueError: there are no factors.
    """
    return squared_norms(factors).sum().clamp_min(0).sqrt()


@torch.no_grad()
def project_(factors: Sequence[Factors], rho: float) -> Projection:
    """Multiply every A and B by sqrt(rho / c) in place if the norm c exceeds rho (Eq. 10).

    Inside the ball no bit changes. Outside, c is first increased by a bound on the error from
    rounding the new factors to their dtype (about 6e-7 of c for random fp32 factors of rank 4), so
    that the norm of the stored factors does not exceed rho.

    Args:
        factors: as in `frobenius_norm`.
        rho: radius of the ball, in the units of the norm.

    Raises:
        ValueError: there are no factors.
    """
    squared_norm, squared_bound = _squared_terms(factors).sum(1)
    c = squared_norm.clamp_min(0).sqrt()
    # Both factors and their multiplier are rounded with a relative error of at most u. 5 u also
    # covers the products of these errors.
    u = max(torch.finfo(layer.A.dtype).eps for layer in factors) / 2
    rounding = 5 * u * squared_bound.sqrt()
    factor = torch.where(c > rho, (rho / (c + rounding)).sqrt(), 1.0)
    _multiply_(factors, factor)
    return Projection(c, c * factor * factor, factor)


@torch.no_grad()
def squared_norms(factors: Sequence[Factors]) -> Tensor:
    """Return ||s B A||_F^2 of each layer, (layers,). Rounding can make a small value negative.

    Raises:
        ValueError: there are no factors.
    """
    return _squared_terms(factors)[0]


def _squared_terms(factors: Sequence[Factors]) -> Tensor:
    """Return two terms for each layer, (2, layers), on the first layer's device.

    The first is ||s B A||_F^2. The second is (s sum_k |b_k| |a_k|)^2, where b_k are the columns of
    B and a_k the rows of A. The factors' rounding error is proportional to its square root.
    """
    if not factors:
        raise ValueError("There are no factors to measure.")
    device = factors[0].A.device
    order: list[int] = []
    columns: list[Tensor] = []
    for layers in _stacks(factors):
        A = exact_stack([factors[i].A for i in layers])  # (stack, r, n)
        B = exact_stack([factors[i].B for i in layers])  # (stack, m, r)
        grams_A = A @ A.mT  # (stack, r, r)
        grams_B = B.mT @ B  # (stack, r, r)
        # Squared norms of the rows of A and of the columns of B, (stack, r).
        rows_A = grams_A.diagonal(dim1=-2, dim2=-1)
        columns_B = grams_B.diagonal(dim1=-2, dim2=-1)
        squared_norm = (grams_A * grams_B).sum((-2, -1))  # tr(G_B G_A), both symmetric
        squared_bound = (rows_A * columns_B).sqrt().sum(-1).square()
        scale = factors[layers[0]].scale
        terms = torch.stack((squared_norm, squared_bound)) * scale**2
        columns.append(terms.to(device))  # (2, stack)
        order += layers
    # The stacks are grouped by shape; restore the order of the layers.
    places = torch.tensor(order).argsort()
    return torch.cat(columns, dim=1)[:, places.to(device, non_blocking=True)]


def _stacks(factors: Sequence[Factors]) -> Iterator[list[int]]:
    """Yield stacks of layers with the same shape and scale, as indices into `factors`."""
    keys = [(f.A.shape, f.B.shape, f.scale, f.A.dtype, f.A.device) for f in factors]
    for group in group_equal(keys):
        layer = factors[group[0]]
        limit = _STACK_ELEMENTS_ELSEWHERE
        if layer.A.device.type == "cpu":
            limit = _STACK_ELEMENTS_ON_CPU
        size = max(1, limit // (layer.A.numel() + layer.B.numel()))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _multiply_(factors: Sequence[Factors], factor: Tensor) -> None:
    """Multiply A and B of every layer by a 0-d tensor in place."""
    for group in group_equal((f.A.dtype, f.A.device) for f in factors):
        tensors: list[Tensor] = []
        for i in group:
            tensors += local_tensor(factors[i].A), local_tensor(factors[i].B)
        dtype = tensors[0].dtype
        if dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(tensors, factor.to(tensors[0].device, dtype))
            continue
        # The multiplier itself must not be rounded to a narrow dtype.
        narrow_factor = factor.to(tensors[0].device, torch.float32)
        for tensor in tensors:
            tensor.copy_(tensor.float() * narrow_factor)
