"""Ablations of Equation 10: an auxiliary without a ball, and one with a ball for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ball
from .auxiliary import Auxiliary


class UnboundedAuxiliary(Auxiliary):
    """An auxiliary that nothing bounds (`--ball none`)."""

    def project_(self, numbers: Sequence[int], rho: float | Tensor) -> ball.Projection:
        # Measured all the same: the log shows how far it goes without Eq. 10.
        norm = self.norm()
        return ball.Projection(before=norm, after=norm, factor=torch.ones_like(norm))


class PerLayerAuxiliary(Auxiliary):
    """An auxiliary clipped to rho / sqrt(layers) in each layer (`--ball per-layer`)."""

    @torch.no_grad()
    def project_(self, numbers: Sequence[int], rho: float | Tensor) -> ball.Projection:
        factors = self.factors()
        squares = ball.squares(factors)
        if isinstance(rho, Tensor):  # of `--rho auto`, perhaps on another device
            rho = rho.to(squares.norm)
        # sum of (rho / sqrt(layers))^2 over the layers is rho^2
        norms, factor = ball.clipping(squares, rho / math.sqrt(len(factors)))  # each (layers,)
        ball.multiply_(factors, factor)
        after = (norms * factor * factor).norm()
        return ball.Projection(before=squares.total(), after=after, factor=factor.amin())
