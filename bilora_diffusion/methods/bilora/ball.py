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
        """The norm over all layers, 0-d."""
        return self.norm.sum().clamp_min(0).sqrt()


@torch.no_grad()
def frobenius_norm(factors: Sequence[Factors]) -> Tensor:
    """sqrt(sum_i ||s_i B_i A_i||_F^2), with s_i each layer's `Factors.scale`.

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
    sums = Squares(*torch.stack(squares(factors)).sum(1, keepdim=True))  # each (1,)
    if isinstance(rho, Tensor):
        rho = rho.to(sums.norm)
    norm, factor = clipping(sums, rho)
    multiply_(factors, factor)
    return Projection(norm[0], (norm * factor * factor)[0], factor[0])


def clipping(sums: Squares, rho: float | Tensor) -> tuple[Tensor, Tensor]:
    """The norm c of each ball, and what to multiply its A and B with for Eq. 10.

    Args:
        sums: terms of one or several balls, summed over their layers, of any shape.
        rho: as in `project_`.
    """
    norm = sums.norm.clamp_min(0).sqrt()
    # Multiplied by f, the stored product E' has at most the norm f^2 (a + b) + f d: a is c with its
    # own rounding, b and d bound the rounding of the new factors. Solved for f where this is rho:
    # f = 2 rho / (d + sqrt(d^2 + 4 rho (a + b))).
    rounding = 8 * torch.finfo(norm.dtype).eps * sums.magnitude
    a = (sums.norm.clamp_min(0) + rounding).sqrt()
    b, d = sums.relative.sqrt(), sums.absolute.sqrt()
    root = 2 * rho / (d + (d * d + 4 * rho * (a + b)).sqrt())
    return norm, torch.where(norm > rho, root, 1.0)


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
    columns: list[Tensor] = []
    for stacks in _stacks(factors):
        layers = list[Factors]()  # of one rank, in the order of their Gram matrices
        grams_A, grams_B = list[Tensor](), list[Tensor]()
        for stack in stacks:
            stack_A, stack_B = list[Tensor](), list[Tensor]()
            for i in stack:
                layers.append(factors[i])
                stack_A.append(full_tensor(factors[i].A))
                stack_B.append(full_tensor(factors[i].B))
            grams_A.append(_gram(torch.stack(stack_A)))  # of (stack, r, n): (stack, r, r)
            grams_B.append(_gram(torch.stack(stack_B).mT))  # of (stack, r, m): (stack, r, r)
            order += stack
        terms = _scaled_squares(layers, torch.cat(grams_A), torch.cat(grams_B))
        columns.append(terms.to(device))  # (4, layers of the rank)
    terms = columns[0]
    if len(columns) > 1:  # several ranks, dtypes or devices
        terms = torch.cat(columns, dim=1)
    # Layers of one shape lie next to each other now; the caller wants them in its own order.
    if order != sorted(order):
        places = torch.tensor(order).argsort()
        terms = terms[:, places.to(device, non_blocking=True)]
    return Squares(*terms)


def _stacks(factors: Sequence[Factors]) -> Iterable[list[list[int]]]:
    """Positions of the layers of one rank, dtype and device, in stacks of one shape, each of as
    many layers as are best multiplied at once.
    """
    stacks_of_rank: dict[tuple[object, ...], list[list[int]]] = {}
    for group in alike((f.A.shape, f.B.shape, f.A.dtype, f.A.device) for f in factors):
        A, B = factors[group[0]].A, factors[group[0]].B
        size = _stack_size(A.device, A.numel() + B.numel())
        # Gram matrices are (r, r) whatever the layer's width, so a rank's shapes share the sums.
        stacks = stacks_of_rank.setdefault((len(A), A.dtype, A.device), [])
        for start in range(0, len(group), size):
            stacks.append(group[start : start + size])
    return stacks_of_rank.values()


def _stack_size(device: torch.device, elements: int) -> int:
    """How many layers of so many elements to stack."""
    return max(1, _STACK_ELEMENTS.get(device.type, _STACK_ELEMENTS_ELSEWHERE) // elements)


def _gram(matrices: Tensor) -> Tensor:
    """V V^T of V (..., r, n), in the precision to compute in: (..., r, r)."""
    matrices = matrices.to(wide(matrices.device))
    return matrices @ matrices.mT


def grams(stacks: Sequence[Tensor]) -> Tensor:
    """V V^T of the layers of several auxiliaries, in the precision to compute in.

    Args:
        stacks: V (layers, r, n) of each auxiliary.

    Returns:
        (layers, auxiliaries, r, r).
    """
    first = stacks[0]
    size = _stack_size(first.device, first[0].numel() * len(stacks))
    parts_of_stack = [stack.split(size) for stack in stacks]
    products = []
    for parts in zip(*parts_of_stack, strict=True):
        matrices = torch.stack(parts, 1)  # (part of the layers, auxiliaries, r, n)
        products.append(_gram(matrices.flatten(0, 1)))
    # (layers * auxiliaries, r, r) -> (layers, auxiliaries, r, r)
    return torch.cat(products).unflatten(0, (-1, len(stacks)))


def _scaled_squares(layers: Sequence[Factors], grams_A: Tensor, grams_B: Tensor) -> Tensor:
    """`Squares` of layers of one rank and dtype, one below the other: (4, layers)."""
    terms = squares_of_grams(
        grams_A,
        grams_B,
        width_A=max(layer.A.shape[1] for layer in layers),
        width_B=max(layer.B.shape[0] for layer in layers),
        dtype=layers[0].A.dtype,
    )
    scales = [layer.scale for layer in layers]
    if len(set(scales)) == 1:  # a number needs no copy to the device
        return terms * scales[0] ** 2
    return terms * torch.tensor(scales, dtype=grams_A.dtype, device=grams_A.device) ** 2


def squares_of_grams(
    grams_A: Tensor, grams_B: Tensor, width_A: int, width_B: int, dtype: torch.dtype
) -> Tensor:
    """The terms of `Squares` without scales, (4, ...), of Gram matrices (..., r, r).

    Args:
        grams_A, grams_B: A A^T and B^T B, in the precision to compute in.
        width_A: n, the largest number of columns of A (r, n).
        width_B: m, the largest number of rows of B (m, r).
        dtype: that the factors are stored in.
    """
    rank = grams_A.shape[-1]
    # Squared norms of the rows of A and the columns of B, (..., r).
    rows_A = grams_A.diagonal(dim1=-2, dim2=-1)
    columns_B = grams_B.diagonal(dim1=-2, dim2=-1)
    unit_roundoff = torch.finfo(dtype).eps / 2
    half_smallest = torch.finfo(dtype).smallest_normal * unit_roundoff
    norm = (grams_A * grams_B).sum((-2, -1))  # tr(G_B G_A), both symmetric
    magnitude = (rows_A * columns_B).sqrt().sum(-1).square()
    norm_A, norm_B = rows_A.sum(-1).sqrt(), columns_B.sum(-1).sqrt()
    # An error of v in each of the r n numbers of A adds at most v sqrt(r n) |B| to ||B A||.
    absolute_A = math.sqrt(rank * width_A) * half_smallest * norm_B
    absolute_B = math.sqrt(width_B * rank) * half_smallest * norm_A
    absolute = (absolute_A + absolute_B).square()
    return torch.stack((norm, magnitude, magnitude * (5 * unit_roundoff) ** 2, absolute))


def multiply_(factors: Sequence[Factors], factor: Tensor) -> None:
    """Multiply A and B in place, by one number, (1,), or by one for each layer, (layers,)."""
    for group in alike((f.A.dtype, f.A.device) for f in factors):
        tensors = []
        for i in group:
            tensors += _local_part(factors[i].A), _local_part(factors[i].B)
        dtype, device = tensors[0].dtype, tensors[0].device
        is_narrow = dtype not in (torch.float32, torch.float64)
        # The multiplier itself must not be rounded to a narrow dtype.
        factor_dtype = torch.float32 if is_narrow else dtype
        multipliers = factor.to(device, factor_dtype).unbind()
        is_shared = len(multipliers) == 1
        by_tensor = []
        for i in group:
            multiplier = multipliers[0 if is_shared else i]
            by_tensor += multiplier, multiplier  # of A and of B: Eq. 10 scales both by one root
        if is_narrow:
            for tensor, multiplier in zip(tensors, by_tensor, strict=True):
                tensor.copy_(tensor.float() * multiplier)
        else:
            torch._foreach_mul_(tensors, multipliers[0] if is_shared else by_tensor)


def full_tensor(tensor: Any) -> Tensor:
    """All of a tensor that FSDP2 has split over processes (a DTensor)."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def _local_part(tensor: Any) -> Tensor:
    """This process's part of it, to be changed in place."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it: it costs little here and makes the bound certain."""
    if device.type == "mps":
        return torch.float32
    return torch.float64
