"""The ball that bounds the auxiliary: the norm of many B @ A, and the projection of Eq. 10.

The products are never formed. With the Gram matrices G_B = B^T B and G_A = A A^T, both (r, r),
||B A||_F^2 = tr(G_B G_A). Layers of one shape are stacked, so that 560 layers take a handful of
kernels, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adapters import Factors, alike

# Elements of one stack. On a CPU it should stay in the cache, which halves the time; elsewhere few
# large kernels are best, and this bounds a stack to 128 MiB in float64.
_STACK_ELEMENTS = {"cpu": 2**18}
_STACK_ELEMENTS_ELSEWHERE = 2**24


class Projection(NamedTuple):
    """The norm before and after a projection: 0-d float64 tensors on the factors' device.

    `factor` is what every A and B was multiplied by, 1 inside the ball; the least of several.
    """

    before: Tensor
    after: Tensor
    factor: Tensor


class Squares(NamedTuple):
    """Terms of the norms of some layers, each (layers,) on the first one's device.

    - norm: ||s B A||^2.
    - magnitude: (s sum_k |b_k| |a_k|)^2 >= ||s |B| |A| ||^2, b_k a column of B, a_k a row of A.
    - relative: the same times (5 u)^2, where u is the unit roundoff of the factors' dtype: both
      factors rounded, the multiplier in each too, with room for the products of these errors.
    - absolute: (s v (sqrt(r n) |B| + sqrt(m r) |A|))^2, where v is half the smallest number of the
      dtype: what rounding adds where numbers are subnormal, as small B are in fp16. m and n are the
      largest of all layers of the rank.
    """

    norm: Tensor
    magnitude: Tensor
    relative: Tensor
    absolute: Tensor

    def total(self) -> Tensor:
        """The norm over all of them, 0-d."""
        return self.norm.sum().clamp_min(0).sqrt()


@torch.no_grad()
def frobenius_norm(factors: Sequence[Factors]) -> Tensor:
    """sqrt(sum_i ||s_i B_i A_i||_F^2), s_i each layer's `Factors.scale`, whatever it measures.

    Args:
        factors: A (r, n) and B (m, r) of each layer; shapes, dtypes and devices may differ.

    Returns:
        0-d float64 tensor on the first layer's device.

    Raises:
        ValueError: no factors.
    """
    return squares(factors).total()


@torch.no_grad()
def project_(factors: Sequence[Factors], rho: float | Tensor) -> Projection:
    """Equation 10, in place: if the norm c exceeds rho, multiply every A and B by sqrt(rho / c).

    Inside the ball nothing changes, to the bit. Outside, c is taken with an upper bound on what the
    rounding of the new factors can add (in float64 that is some 1e-16 of c, in fp32 some 1e-7), so
    that the norm of what is stored is at most rho (1 + 1e-6) in any dtype.

    Args:
        factors: as in `frobenius_norm`.
        rho: the radius, in the units of that norm; a tensor is 0-d, of any precision.

    Raises:
        ValueError: no factors.
    """
    sums = Squares(*torch.stack(squares(factors)).sum(1, keepdim=True))
    before, factor = clipping(sums, rho.to(sums.norm) if isinstance(rho, Tensor) else rho)
    multiply_(factors, factor)
    return Projection(before[0], (before * factor * factor)[0], factor[0])


def clipping(sums: Squares, rho: float | Tensor) -> tuple[Tensor, Tensor]:
    """The norms c that make these sums over layers, and what to multiply A and B with for Eq. 10.

    Args:
        sums: of one or several balls, of any shape.
        rho: as in `project_`.
    """
    before = sums.norm.clamp_min(0).sqrt()
    # ||E'|| <= f^2 (a + b) + f d with E' the stored product after multiplying by f: solve for = rho
    a = (sums.norm.clamp_min(0) + 8 * torch.finfo(before.dtype).eps * sums.magnitude).sqrt()
    b, d = sums.relative.sqrt(), sums.absolute.sqrt()
    root = 2 * rho / (d + (d * d + 4 * rho * (a + b)).sqrt())
    return before, torch.where(before > rho, root, 1.0)


@torch.no_grad()
def squares(factors: Sequence[Factors]) -> Squares:
    """Terms of the norms of these layers, in their order.

    Raises:
        ValueError: no factors.
    """
    if not factors:
        raise ValueError("There are no factors to measure.")
    device = factors[0].A.device
    order: list[int] = []
    parts = []
    for stacks in _stacks(factors):
        grams = [_grams([factors[i] for i in stack]) for stack in stacks]
        gram_A, gram_B = (torch.cat(side) for side in zip(*grams, strict=True))
        positions = [i for stack in stacks for i in stack]
        parts.append(_squares([factors[i] for i in positions], gram_A, gram_B).to(device))
        order += positions
    columns = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if order != sorted(order):
        places = torch.tensor(order).argsort()
        columns = columns[:, places.to(device, non_blocking=True)]
    return Squares(*columns)


def _grams(layers: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """A A^T and B^T B of layers of one shape, dtype and device, each (layers, r, r)."""
    A, B = (torch.stack([whole(getattr(f, side)) for f in layers]) for side in "AB")
    return _gram(A), _gram(B.mT)


def _gram(V: Tensor) -> Tensor:
    V = V.to(wide(V.device))
    return V @ V.mT


def grams(blocks: Sequence[Tensor]) -> Tensor:
    """V V^T of the V (layers, r, n) in several blocks, in the precision to compute in: (layers,
    blocks, r, r).
    """
    at_once = _at_once(blocks[0].device, blocks[0][0].numel() * len(blocks))
    stacks = zip(*(block.split(at_once) for block in blocks), strict=True)
    each = [_gram(torch.stack(stack, 1).flatten(0, 1)) for stack in stacks]
    return torch.cat(each).unflatten(0, (-1, len(blocks)))


def _squares(layers: Sequence[Factors], gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """`Squares` of layers of one rank and dtype, one below the other: (4, layers)."""
    dtype = layers[0].A.dtype
    n, m = max(f.A.shape[1] for f in layers), max(f.B.shape[0] for f in layers)
    rows = of_grams(gram_A, gram_B, n, m, dtype)
    scales = [f.scale for f in layers]
    if len(set(scales)) == 1:
        return rows * scales[0] ** 2
    return rows * torch.tensor(scales, dtype=gram_A.dtype, device=gram_A.device) ** 2


def of_grams(gram_A: Tensor, gram_B: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """The columns of `Squares` without scales, (4, ...), of Gram matrices (..., r, r).

    Args:
        gram_A, gram_B: A A^T and B^T B, in the precision to compute in.
        n, m: the largest.
        dtype: that the factors are stored in.
    """
    r = gram_A.shape[-1]
    diagonal_A, diagonal_B = (gram.diagonal(dim1=-2, dim2=-1) for gram in (gram_A, gram_B))
    rounding = torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal * rounding
    norm = (gram_A * gram_B).sum((-2, -1))
    magnitude = (diagonal_A * diagonal_B).sqrt().sum(-1).square()
    norm_A, norm_B = diagonal_A.sum(-1).sqrt(), diagonal_B.sum(-1).sqrt()
    absolute = (math.sqrt(r * n) * least * norm_B + math.sqrt(m * r) * least * norm_A).square()
    return torch.stack((norm, magnitude, magnitude * (5 * rounding) ** 2, absolute))


def _stacks(factors: Sequence[Factors]) -> Iterable[list[list[int]]]:
    """Positions of the layers of one rank, dtype and device, in stacks of one shape, each of as
    many as are best multiplied at once.
    """
    ranks: dict[tuple[object, ...], list[list[int]]] = {}
    for group in alike((f.A.shape, f.B.shape, f.A.dtype, f.A.device) for f in factors):
        A, B = factors[group[0]].A, factors[group[0]].B
        at_once = _at_once(A.device, A.numel() + B.numel())
        stacks = ranks.setdefault((len(A), A.dtype, A.device), [])
        stacks += [group[start : start + at_once] for start in range(0, len(group), at_once)]
    return ranks.values()


def _at_once(device: torch.device, elements: int) -> int:
    """How many layers of so many elements to stack."""
    return max(1, _STACK_ELEMENTS.get(device.type, _STACK_ELEMENTS_ELSEWHERE) // elements)


def multiply_(factors: Sequence[Factors], factor: Tensor) -> None:
    """Multiply A and B in place, by one number, (1,), or by one for each layer, (layers,)."""
    for group in alike((f.A.dtype, f.A.device) for f in factors):
        tensors = [_local(side) for i in group for side in (factors[i].A, factors[i].B)]
        dtype, device = tensors[0].dtype, tensors[0].device
        exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        by = factor.to(device=device, dtype=exact).unbind()
        each = by * len(tensors) if len(by) == 1 else [by[i] for i in group for _ in "AB"]
        if exact is not dtype:  # the multiplier itself must not be rounded to the narrow dtype
            for tensor, multiplier in zip(tensors, each, strict=True):
                tensor.copy_(tensor.float() * multiplier)
        else:
            torch._foreach_mul_(tensors, by[0] if len(by) == 1 else each)


def whole(tensor: Any) -> Tensor:
    """All of a tensor that FSDP2 has split over processes (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Any) -> Tensor:
    """This process's share of it, to be changed in place."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it: it costs little here and makes the bound certain."""
    return torch.float32 if device.type == "mps" else torch.float64
