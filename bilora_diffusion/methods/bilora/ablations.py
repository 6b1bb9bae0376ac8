"""Ablations of Equation 10: an auxiliary without a ball, and one with a ball for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ball
from .auxiliary import Auxiliary


class Unbounded(Auxiliary):
    """An auxiliary that nothing bounds (`--ball none`)."""

    def project_(self, groups: Sequence[int], rho: float | Tensor) -> ball.Projection:
        norm = self.norm()
        return ball.Projection(norm, norm, torch.ones_like(norm))


class PerLayer(Auxiliary):
    """An auxiliary clipped to rho / sqrt(layers) in each layer (`--ball per-layer`)."""

    @torch.no_grad()
    def project_(self, groups: Sequence[int], rho: float | Tensor) -> ball.Projection:
        factors = self.factors()
        squares = ball.squares(factors)
        bound = (rho.to(squares.norm) if isinstance(rho, Tensor) else rho) / math.sqrt(len(factors))
        before, factor = ball.clipping(squares, bound)
        ball.multiply_(factors, factor)
        after = (before * factor * factor).norm()
        return ball.Projection(squares.total(), after, factor.amin())
