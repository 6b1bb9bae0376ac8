"""Other ways to move Bi-LoRA's auxiliary than the optimizer's, and what follows a projection.

**Power iteration.** For the gradient G of a weight, with G = U S V^T, the perturbation of rank r
and norm rho that raises the loss most to first order is rho U_r S_r V_r^T / ||S_r||_F; over several
layers the same with one norm over all. Block power iteration (Golub & Van Loan, Matrix
Computations, Section 8.2.4) finds the singular vectors from products with G and G^T, and these are
what a backward pass leaves: with E = s B A the factors' gradients are g_B = s G A^T and
g_A = s B^T G. So a step takes one of two halves in turn, each the best answer to G within the
subspace that is kept:

    A has orthonormal rows:     B <- G A^T,  then B A = Q (R A), Q orthonormal
    B has orthonormal columns:  A <- B^T G,  then B A = (B L) P, P orthonormal

Against a fixed G the gain <G, E> never falls from one step to the next.

A layer without a gradient (an expert of a mixture that no row chose, a layer behind the one whose
output is read) keeps its E and its turn: it takes the same half when it next has a gradient. So its
E answers the last gradient that it had, and is zero if it never had one. For that E to keep its
proportion to the others', which come in units of the gradient, the multiplier of the last
projection is taken out of all factors first: by it the orthonormal ones are longer than they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters import Factors, alike
from ..errors import UserError


@torch.no_grad()
def orthonormalize_rows_(factors: Sequence[Factors]) -> None:
    """Replace each A by an orthonormal basis of its rows: where power iteration starts.

    Args:
        factors: A (r, n), B (m, r) with r <= n and r <= m.

    Raises:
        UserError: a layer of smaller sides.
    """
    for name, A, B, _ in factors:
        if A.shape[0] > min(A.shape[1], B.shape[0]):
            raise UserError(
                f"{name} is {B.shape[0]} x {A.shape[1]}, too small for power iteration at "
                f"rank {A.shape[0]}; lower auxiliary_rank or take it out of the targets."
            )
    for group in same_shape(factors):
        basis, _ = _qr(torch.stack([factors[i].A for i in group]).mT)
        for i, rows in zip(group, basis.mT, strict=True):
            factors[i].A.copy_(rows)


@torch.no_grad()
def power_step_(
    factors: Sequence[Factors],
    gradients: Sequence[Factors | None],
    halves: Sequence[int],
    sign: float,
) -> list[int]:
    """One half of block power iteration, in place; the product's length is left to a projection.

    Args:
        factors: A (r, n), B (m, r) of each layer; A's rows (half 0) or B's columns (half 1) are
            orthonormal up to one factor, which both A and B of the layer were multiplied by.
        gradients: of the same, in the same form; None for a layer that has none.
        halves: whose turn it is on each layer: 0, B becomes G A^T; 1, A becomes B^T G.
        sign: 1 climbs, -1 descends.

    Returns:
        Whose turn is next, on each layer.
    """
    following = list(halves)
    states = [(half, g is None) for half, g in zip(halves, gradients, strict=True)]
    for group in same_shape(factors, states):
        first = group[0]
        scale, half = factors[first].scale, halves[first]
        A, B = (torch.stack([getattr(factors[i], name) for i in group]) for name in "AB")
        wide = torch.promote_types(A.dtype, torch.float32)
        A, B = A.to(wide), B.to(wide)
        # r orthonormal rows or columns have the norm sqrt(r).
        length = torch.linalg.matrix_norm(A if half == 0 else B, keepdim=True) / A.shape[1] ** 0.5
        A, B = A / length, B / length
        if gradients[first] is not None:
            # s B A = G A^T A needs B = G A^T / s = g_B / s^2; likewise for A. So layers of
            # different scales keep the proportions of their gradients.
            name = "B" if half == 0 else "A"
            new = torch.stack([getattr(gradients[i], name) for i in group]).to(wide)
            new = new * (sign / scale**2) / length
            if half == 0:
                B, rest = _qr(new)
                A = rest @ A
            else:
                basis, rest = _qr(new.mT)
                A, B = basis.mT, B @ rest.mT
        for i, a, b in zip(group, A, B, strict=True):
            factors[i].A.copy_(a)
            factors[i].B.copy_(b)
            following[i] = half if gradients[i] is None else 1 - half
    return following


MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Of Adam: by which power of f they shrink with factors that a projection multiplied by f."""


@torch.no_grad()
def shrink_(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    factor: Tensor,
    each: bool = False,
) -> None:
    """Multiply Adam's moments as a projection multiplied the factors.

    Otherwise the second remembers the larger gradients that it saw before the projections, and the
    auxiliary's steps become small.

    Args:
        parameters: those that were multiplied, A and B of each layer in turn.
        factor: f, 0-d, or (layers,) with `each`.
    """
    by = factor.repeat_interleave(2).unbind() if each else [factor] * len(parameters)
    for parameter, f in zip(parameters, by, strict=True):
        state = optimizer.state.get(parameter, {})
        for name in MOMENTS.keys() & state.keys():
            state[name].mul_((f ** MOMENTS[name]).to(state[name]))


def _qr(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of (L, m, r) in float32 or better, r <= m."""
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    return torch.linalg.qr(wide)


def same_shape(
    factors: Sequence[Factors], others: Sequence[object] | None = None
) -> list[list[int]]:
    """The positions of layers of one shape, for which `others` are equal too."""
    return alike(
        (f.A.shape, f.B.shape, f.A.dtype, f.A.device, f.scale, others and others[i])
        for i, f in enumerate(factors)
    )
