"""PiSSA: the adapter starts as the best rank-r approximation of its weight.

Source: Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models (https://arxiv.org/abs/2404.02948), Equations 2-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 2048
"""Shorter side up to which the whole decomposition is computed.

On one CPU thread it takes 1.5 s at 1280 x 1280 (SDXL's most frequent layer) and 5 s at 2048; at
4096 it would be minutes for each of some 200 layers of a 7 B model, for r of 4096 components.
"""
OVERSAMPLING, ITERATIONS = 16, 16


def pissa(weight: Tensor, rank: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A0 = sqrt(S_r / s) V_r^T and B0 = U_r sqrt(S_r / s), where W = U S V^T (Eqs. 2 and 3).

    So s B0 A0 is the best rank-r approximation of W. Beyond `EXACT_UP_TO` the r components come
    from randomized subspace iteration (Halko et al. 2011), as the paper's fast SVD; the model's
    function is the same either way, since what A0 and B0 hold is what W loses.

    Args:
        weight: W, (m, n), fp32 or fp64.
        rank: r <= min(m, n).
        scale: s = alpha / r of the adapter.
        seed: of the randomized decomposition; torch's global generator is left alone.

    Returns:
        A0 (r, n) and B0 (m, r).
    """
    short = min(weight.shape)
    if short <= EXACT_UP_TO:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = seeded_svd(weight, min(rank + OVERSAMPLING, short), ITERATIONS, seed)
        Vh = V.T
    signed = signs(Vh[:rank].T) * (S[:rank] / scale).sqrt()
    return signed[:, None] * Vh[:rank], U[:, :rank] * signed


def signs(columns: Tensor) -> Tensor:
    """1 or -1 for each column, (r,), so that times it the column's largest entry is positive.

    A decomposition leaves the signs of singular vectors open, and which it takes depends on the
    last bit of its input: on how a batch was cut, for a gradient.
    """
    largest = columns.abs().argmax(0, keepdim=True)
    return columns.gather(0, largest)[0].sign()


def seeded_svd(
    matrix: Tensor, size: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.svd_lowrank` as a function of its arguments alone: U (m, size), S, V (n, size)."""
    on_cuda = matrix.device.type == "cuda"
    with torch.random.fork_rng(devices=[matrix.device] if on_cuda else []):
        generator = torch.cuda if on_cuda else torch.default_generator
        generator.manual_seed(seed)
        return torch.svd_lowrank(matrix, q=size, niter=iterations)
