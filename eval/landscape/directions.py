"""Normalized random directions (Li et al. 2018, https://arxiv.org/abs/1712.09913, Section 4).

A direction has standard normal entries, and each of its filters is scaled to the norm of the
weights' own filter:

    d_ij <- d_ij / ||d_ij|| * ||w_ij||

so that a step of length t moves every filter by t times its norm, whatever its scale. A filter of
zeros stays where it is. Directions depend on (seed, number, name of the weight) alone, so every run
is looked at along the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bilora_diffusion.seeds import generator

from .weights import Weight

KEPT_NUMBERS = 2**28
"""A direction of up to so many entries is kept; a larger one is drawn anew whenever it is used."""


def filter_normalized(direction: Tensor, weight: Tensor, filter_dim: int = 0) -> Tensor:
    """``direction`` with the norm of each filter set to that of ``weight``'s filter.

    Args:
        direction: same shape as ``weight``.
        weight: (m, n) or, of a convolution, (out, in, h, w).
        filter_dim: the dimension whose entries are filters.
    """
    rest = tuple(dim for dim in range(weight.dim()) if dim != filter_dim)
    wide = torch.promote_types(weight.dtype, torch.float32)
    wanted = torch.linalg.vector_norm(weight, dim=rest, keepdim=True, dtype=wide)
    has = torch.linalg.vector_norm(direction, dim=rest, keepdim=True, dtype=wide)
    return direction * (wanted / has.clamp_min(torch.finfo(wide).tiny))


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
        keep: hold it in memory; by default where it has at most ``KEPT_NUMBERS`` entries. If not,
            one layer's part is in memory at a time, and drawn anew each time.
    """

    def __init__(
        self, weights: Sequence[Weight], seed: int, number: int, keep: bool | None = None
    ) -> None:
        # The values of now: within `displaceable` the weights hold displaced copies.
        self._weights = [weight._replace(tensor=weight.tensor.data) for weight in weights]
        self._key = (seed, number)
        if keep is None:
            keep = sum(weight.tensor.numel() for weight in weights) <= KEPT_NUMBERS
        self._kept = list(self._drawn()) if keep else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept) if self._kept is not None else self._drawn()

    @torch.no_grad()
    def _drawn(self) -> Iterator[Tensor]:
        for weight in self._weights:
            noise = gaussian(weight, *self._key)
            yield filter_normalized(noise, weight.tensor, weight.filter_dim)
