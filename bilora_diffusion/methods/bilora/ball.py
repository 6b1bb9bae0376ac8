"""The ball that bounds the auxiliary: the norm of many B @ A, and the projection of Eq. 10.

The products are never formed. With the Gram matrices G_B = B^T B and G_A = A A^T, both (r, r),
||B A||_F^2 = tr(G_B G_A). Layers of one shape are stacked, so that 560 layers take few kernels, and
nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adapters import Factors, group_equal

# Elements of one stack. On a CPU a stack should stay in the cache, which halves the time; elsewhere
# few large kernels are best, of stacks of at most 128 MiB in float64.
_STACK_ELEMENTS_ON_CPU = 2**18
_STACK_ELEMENTS_ELSEWHERE = 2**24


class Projection(NamedTuple):
    """Outcome of a projection: 0-d float64 tensors on the factors' device."""

    before: Tensor  # norm before it
    after: Tensor  # norm after it
    factor: Tensor  # what A and B were multiplied by, 1 inside the ball; the least of several


class Squares(NamedTuple):
    """Terms of the norms of some layers, each (layers,) on the first one's device.

    - norm: ||s B A||^2.
    - magnitude: (s sum_k |b_k| |a_k|)^2 >= ||s |B| |A| ||^2, b_k a column of B, a_k a row of A.
    - relative: magnitude times (5 u)^2, where u is the unit roundoff of the factors' dtype. It
      bounds the rounding of both factors and of the multiplier in each, with room for the products
      of these errors.
    - absolute: (s v (sqrt(r n) |B| + sqrt(m r) |A|))^2, where v is half the smallest number of the
      dtype. It bounds the rounding of subnormal numbers, such as small B in fp16. m and n are the
      largest of all layers of the rank.
    """

    norm: Tensor
    magnitude: Tensor
    relative: Tensor
    absolute: Tensor

    def joint_norm(self) -> Tensor:
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
    return squares(factors).joint_norm()


@torch.no_grad()
def project_(factors: Sequence[Factors], rho: float | Tensor) -> Projection:
    """Equation 10, in place: if the norm c exceeds rho, multiply every A and B by sqrt(rho / c).

    Inside the ball nothing changes, to the bit. Outside, an upper bound on what the rounding of the
    new factors can add is added to c (in float64 about 1e-16 of c, in fp32 about 1e-7), so that the
    norm of the stored factors is at most rho (1 + 1e-6) in any dtype.

    Args:
        factors: as in `frobenius_norm`.
        rho: the radius, in the units of that norm; a tensor is 0-d, of any precision.

    Raises:
        ValueError: no factors.
    """
    terms = torch.stack(squares(factors))  # (4, layers)
    sums = Squares._make(terms.sum(1, keepdim=True))  # each (1,)
    if isinstance(rho, Tensor):
        rho = rho.to(sums.norm)
    norm, factor = clipping(sums, rho)
    multiply_(factors, factor)
    return Projection(norm[0], (norm * factor * factor)[0], factor[0])


def clipping(sums: Squares, rho: float | Tensor) -> tuple[Tensor, Tensor]:
    """The norm c of each ball, and the factor on its A and B for Eq. 10.

    Args:
        sums: terms of one or several balls, summed over their layers, of any shape.
        rho: as in `project_`.

    Returns:
        Norm and factor, in the shape of the terms.
    """
    norm = sums.norm.clamp_min(0).sqrt()
    # With A and B times f, the stored product has at most the norm f^2 (a + b) + f d. Here a is c
    # with its own rounding; b and d bound the rounding of the new factors. It is rho for
    #     f = 2 rho / (d + sqrt(d^2 + 4 rho (a + b))).
    rounding = 8 * torch.finfo(norm.dtype).eps * sums.magnitude
    a = (sums.norm.clamp_min(0) + rounding).sqrt()
    b = sums.relative.sqrt()
    d = sums.absolute.sqrt()
    denominator = d + (d * d + 4 * rho * (a + b)).sqrt()
    # In fp32 it can be 0 for a radius of 0, where the factor is 0.
    f = 2 * rho / denominator.clamp_min(torch.finfo(norm.dtype).tiny)
    return norm, torch.where(norm > rho, f, 1.0)


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
        layers: list[Factors] = []  # of one rank, in the order of their Gram matrices
        grams_A: list[Tensor] = []
        grams_B: list[Tensor] = []
        for stack in stacks:
            stack_layers = [factors[i] for i in stack]
            A = torch.stack([full_tensor(layer.A) for layer in stack_layers])  # (stack, r, n)
            B = torch.stack([full_tensor(layer.B) for layer in stack_layers])  # (stack, m, r)
            grams_A.append(_gram(A))  # (stack, r, r)
            grams_B.append(_gram(B.mT))  # (stack, r, r)
            layers += stack_layers
            order += stack
        terms = _scaled_squares(layers, torch.cat(grams_A), torch.cat(grams_B))
        columns.append(terms.to(device))  # (4, layers of the rank)
    terms = columns[0]
    if len(columns) > 1:  # several ranks, dtypes or devices
        terms = torch.cat(columns, dim=1)
    # Layers of one shape lie next to each other now; this restores the caller's order.
    if order != sorted(order):
        places = torch.tensor(order).argsort()
        terms = terms[:, places.to(device, non_blocking=True)]
    return Squares._make(terms)


def _stacks(factors: Sequence[Factors]) -> Iterable[list[list[int]]]:
    """Positions of layers in stacks of one shape, each of as many as are best multiplied at once.

    Returns:
        The stacks of each rank, dtype and device.
    """
    stacks_of_rank: dict[tuple[object, ...], list[list[int]]] = {}
    for group in group_equal((f.A.shape, f.B.shape, f.A.dtype, f.A.device) for f in factors):
        layer = factors[group[0]]
        size = _stack_size(layer.A.device, layer.A.numel() + layer.B.numel())
        # Gram matrices are (r, r) whatever the layer's width, so a rank's shapes share the sums.
        key = (len(layer.A), layer.A.dtype, layer.A.device)
        stacks = stacks_of_rank.setdefault(key, [])
        for start in range(0, len(group), size):
            stacks.append(group[start : start + size])
    return stacks_of_rank.values()


def _stack_size(device: torch.device, elements: int) -> int:
    """Number of layers in a stack, each of so many elements."""
    limit = _STACK_ELEMENTS_ELSEWHERE
    if device.type == "cpu":
        limit = _STACK_ELEMENTS_ON_CPU
    return max(1, limit // elements)


def _gram(matrices: Tensor) -> Tensor:
    """V V^T of V (..., r, n), in the precision to compute in (`wide_dtype`): (..., r, r)."""
    matrices = matrices.to(wide_dtype(matrices.device))
    return matrices @ matrices.mT


def grams(stacks: Sequence[Tensor]) -> Tensor:
    """V V^T of the layers of several auxiliaries, in the precision to compute in (`wide_dtype`).

    Args:
        stacks: V (layers, r, n) of each auxiliary.

    Returns:
        (layers, auxiliaries, r, r).
    """
    layer = stacks[0][0]  # (r, n)
    size = _stack_size(layer.device, layer.numel() * len(stacks))
    products = []
    for start in range(0, len(stacks[0]), size):
        parts = [stack[start : start + size] for stack in stacks]
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
    norm_A = rows_A.sum(-1).sqrt()
    norm_B = columns_B.sum(-1).sqrt()
    # An error of v in each of the r n numbers of A adds at most v sqrt(r n) |B| to ||B A||.
    absolute_A = math.sqrt(rank * width_A) * half_smallest * norm_B
    absolute_B = math.sqrt(width_B * rank) * half_smallest * norm_A
    absolute = (absolute_A + absolute_B).square()
    return torch.stack((norm, magnitude, magnitude * (5 * unit_roundoff) ** 2, absolute))


def multiply_(factors: Sequence[Factors], factor: Tensor) -> None:
    """Multiply A and B in place, by one number, (1,), or by one for each layer, (layers,)."""
    for group in group_equal((f.A.dtype, f.A.device) for f in factors):
        tensors: list[Tensor] = []
        for i in group:
            tensors += _local_part(factors[i].A), _local_part(factors[i].B)
        dtype = tensors[0].dtype
        is_narrow = dtype not in (torch.float32, torch.float64)
        # The multiplier itself must not be rounded to a narrow dtype.
        factor_dtype = torch.float32 if is_narrow else dtype
        multipliers = factor.to(tensors[0].device, factor_dtype).unbind()
        is_shared = len(multipliers) == 1
        if is_shared and not is_narrow:
            torch._foreach_mul_(tensors, multipliers[0])
            continue
        multiplier_of_tensor: list[Tensor] = []
        for i in group:
            multiplier = multipliers[0 if is_shared else i]
            multiplier_of_tensor += multiplier, multiplier  # Eq. 10 scales A and B by one root
        if is_narrow:
            for tensor, multiplier in zip(tensors, multiplier_of_tensor, strict=True):
                tensor.copy_(tensor.float() * multiplier)
        else:
            torch._foreach_mul_(tensors, multiplier_of_tensor)


def full_tensor(tensor: Any) -> Tensor:
    """The whole tensor of a part that FSDP2 leaves to a process (a DTensor)."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def _local_part(tensor: Any) -> Tensor:
    """This process's part of a DTensor, to be changed in place; any other tensor itself."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The precision to compute in: float64 where the device has it.

    It takes little time here, and the bound needs it.
    """
    if device.type == "mps":
        return torch.float32
    return torch.float64
