"""The ball that bounds the auxiliary: the norm of many B @ A, and the projection of Eq. 10.

The products are never formed. With the Gram matrices G_B = B^T B and G_A = A A^T, both (r, r),
||B A||_F^2 = tr(G_B G_A). Layers of one shape are stacked, so that 560 layers take a handful of
kernels, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters import Factors

# Elements of one stack. On a CPU it should stay in the cache, which halves the time; elsewhere few
# large kernels are best, and this bounds a stack to 128 MiB in float64.
_STACK_ELEMENTS = {"cpu": 2**18}
_STACK_ELEMENTS_ELSEWHERE = 2**24


class Projection(NamedTuple):
    """The norm before and after a projection: 0-d float64 tensors on the factors' device.

    `factor` is what every A and B was multiplied by, 1 inside the ball.
    """

    before: Tensor
    after: Tensor
    factor: Tensor


class _Sums(NamedTuple):
    """Squares summed over layers, all 0-d: see `_measure`."""

    norm: Tensor
    magnitude: Tensor
    relative: Tensor
    absolute: Tensor


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
    return _measure(factors).norm.clamp_min(0).sqrt()


@torch.no_grad()
def project_(factors: Sequence[Factors], rho: float | Tensor, onto: bool = False) -> Projection:
    """Equation 10, in place: if the norm c exceeds rho, multiply every A and B by sqrt(rho / c).

    Inside the ball nothing changes, to the bit. Outside, c is taken with an upper bound on what the
    rounding of the new factors can add (in float64 that is some 1e-16 of c, in fp32 some 1e-7), so
    that the norm of what is stored is at most rho (1 + 1e-6) in any dtype.

    Args:
        factors: as in `frobenius_norm`.
        rho: the radius, in the units of that norm; a tensor is 0-d, of any precision.
        onto: put what lies inside the ball on its surface too, unless it is zero.

    Raises:
        ValueError: no factors.
    """
    sums = _measure(factors)
    before = sums.norm.clamp_min(0).sqrt()
    # ||E'|| <= f^2 (a + b) + f d with E' the stored product after multiplying by f: solve for = rho
    if isinstance(rho, Tensor):
        rho = rho.to(before)
    a = (sums.norm.clamp_min(0) + 8 * torch.finfo(before.dtype).eps * sums.magnitude).sqrt()
    b, d = sums.relative.sqrt(), sums.absolute.sqrt()
    root = 2 * rho / (d + (d * d + 4 * rho * (a + b)).sqrt())
    factor = torch.where(before > (0 if onto else rho), root, 1.0)
    _multiply_(factors, factor)
    return Projection(before, before * factor * factor, factor)


def _measure(factors: Sequence[Factors]) -> _Sums:
    """Sums over layers: of ||s B A||^2; and of bounds on what goes into rounding errors, squared.

    - magnitude: (s sum_k |b_k| |a_k|)^2 >= ||s |B| |A| ||^2, b_k a column of B, a_k a row of A.
    - relative: the same times (5 u)^2, where u is the unit roundoff of the factors' dtype: both
      factors rounded, the multiplier in each too, with room for the products of these errors.
    - absolute: (s v (sqrt(r n) |B| + sqrt(m r) |A|))^2, where v is half the smallest number of the
      dtype: what rounding adds where numbers are subnormal, as small B are in fp16.
    """
    if not factors:
        raise ValueError("There are no factors to measure.")
    device = factors[0].A.device
    total = [torch.zeros((), dtype=wide(device), device=device) for _ in _Sums._fields]
    for stack_A, stack_B, scale, dtype in _stacks(factors):
        r, n, m = stack_A.shape[1], stack_A.shape[2], stack_B.shape[1]
        gram_A, gram_B = stack_A @ stack_A.mT, stack_B.mT @ stack_B
        diagonal_A, diagonal_B = gram_A.diagonal(dim1=1, dim2=2), gram_B.diagonal(dim1=1, dim2=2)
        rounding = torch.finfo(dtype).eps / 2
        least = torch.finfo(dtype).smallest_normal * rounding
        norm = ((gram_A * gram_B).sum((1, 2)) * scale**2).sum()
        magnitude = ((diagonal_A * diagonal_B).sqrt().sum(1) * scale).square().sum()
        norm_A, norm_B = diagonal_A.sum(1).sqrt(), diagonal_B.sum(1).sqrt()
        absolute = math.sqrt(r * n) * norm_B + math.sqrt(m * r) * norm_A
        absolute = (absolute * scale * least).square().sum()
        for i, value in enumerate((norm, magnitude, magnitude * (5 * rounding) ** 2, absolute)):
            total[i] += value.to(device)
    return _Sums(*total)


def _stacks(
    factors: Sequence[Factors],
) -> Iterator[tuple[Tensor, Tensor, float | Tensor, torch.dtype]]:
    """Layers of one kind as (L, r, n) and (L, m, r) in wide precision, with their scales: a number
    where they have one in common, else (L,).
    """
    groups: dict[tuple[object, ...], list[Factors]] = {}
    for f in factors:
        key = (f.A.shape, f.B.shape, f.A.dtype, f.A.device)
        groups.setdefault(key, []).append(f)
    for group in groups.values():
        first = group[0]
        precision = wide(first.A.device)
        most = _STACK_ELEMENTS.get(first.A.device.type, _STACK_ELEMENTS_ELSEWHERE)
        at_once = max(1, most // (first.A.numel() + first.B.numel()))
        for start in range(0, len(group), at_once):
            chunk = group[start : start + at_once]
            scales = [f.scale for f in chunk]
            alike = len(set(scales)) == 1
            yield (
                torch.stack([whole(f.A) for f in chunk]).to(precision),
                torch.stack([whole(f.B) for f in chunk]).to(precision),
                scales[0]
                if alike
                else torch.tensor(scales, dtype=precision, device=first.A.device),
                first.A.dtype,
            )


def _multiply_(factors: Sequence[Factors], factor: Tensor) -> None:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for f in factors:
        groups.setdefault((f.A.dtype, f.A.device), []).extend((_local(f.A), _local(f.B)))
    for (dtype, device), tensors in groups.items():
        if dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(tensors, factor.to(device=device, dtype=dtype))
        else:  # the multiplier itself must not be rounded to the narrow dtype
            for tensor in tensors:
                tensor.copy_(tensor.float() * factor.to(device=device, dtype=torch.float32))


def whole(tensor: Any) -> Tensor:
    """All of a tensor that FSDP2 has split over processes (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Any) -> Tensor:
    """This process's share of it, to be changed in place."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it: it costs little here and makes the bound certain."""
    return torch.float32 if device.type == "mps" else torch.float64
