"""Records of ``--log_dynamics``: how the adapters' factors move, and what the second one does.

Every ``--dynamics_steps`` steps the main process takes

- of every method with adapters: the factors A and B (``snapshots``);
- of LoRA-SAM, at the moment of the perturbation: Frobenius norms of B e_A, e_B A and e_B e_A, the
  terms of Equation 5, of the sum of the first two, and of B A;
- of Bi-LoRA: the first-order ascent gain <G, s B2 A2>, from gradients that are there already, and
  how far the subspaces of primary and auxiliary coincide.

Products B A are never formed (Gram matrices in float64, on the CPU). All norms have the scale s =
alpha / r in them, so that they are in units of the weights. Without the flag there is no object of
this class, no hook and no allocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY, Factors, alike
from ..run import snapshots

SNAPSHOTS = 40
"""About how many are taken where ``--dynamics_steps`` is not given."""
TERMS = ("norm_BeA", "norm_eBA", "norm_eBeA")
FIRST_ORDER, PRODUCT, RATIO = "norm_first_order", "norm_BA", "ratio"
COLUMNS, ROWS, COSINE, GAIN = "column_overlap", "row_overlap", "product_cosine", "ascent_gain"
NORMS = (*TERMS, FIRST_ORDER, PRODUCT, "norm_primary", "norm_auxiliary")


class Dynamics:
    """Records a run; made before the method binds its own hooks, in the main process, as the
    others' primaries are the same.

    Args:
        trainer: whose steps are recorded.
        optimizer: the raw torch optimizer. The hook on its steps sees gradients that are unscaled
            and not yet turned around, and does not run on steps that a gradient scaler skips.
    """

    def __init__(self, trainer: Any, optimizer: Optimizer) -> None:
        self._trainer = trainer
        self.every = trainer.cfg.dynamics_steps or -(-trainer.num_steps // SNAPSHOTS)
        self._layers = trainer.method.layers
        self._figures: dict[str, Tensor] = {}
        self._taken: snapshots.Snapshot | None = None
        trainer.method.on_perturbed = self.perturbed
        if AUXILIARY in trainer.method.adapters:
            optimizer.register_step_pre_hook(self._before_step)

    def due(self, step: int) -> bool:
        """Test that a step (0: before training) is recorded; the last one always is."""
        return step % self.every == 0 or step == self._trainer.num_steps

    def perturbed(self) -> None:
        """Called by LoRA-SAM: the weights hold A + e_A and B + e_B, and their ``.grad`` holds e."""
        if self.due(self._trainer.step + 1):
            moved = self._factors(PRIMARY)
            self._figures |= perturbation_norms(moved, self._gradients(PRIMARY, moved))

    def _before_step(self, *_: Any) -> None:
        if self.due(self._trainer.step + 1):
            factors = self._factors(AUXILIARY)
            self._figures[GAIN] = ascent_gain(factors, self._gradients(AUXILIARY, factors))

    def values(self) -> dict[str, Any]:
        """For the line of the step just taken: totals over layers, {} when nothing is due."""
        step = self._trainer.step
        if not self.due(step):
            return {}
        own = self._trainer.method.adapters
        factors = {adapter: self._factors(adapter) for adapter in own}
        if AUXILIARY in factors:
            self._figures |= alignment(factors[PRIMARY], factors[AUXILIARY])
        self._taken = snapshots.Snapshot(step, factors, self._figures)
        self._figures = {}
        return {"dynamics": totals(self._taken.layers)}

    def write(self, folder: Path) -> None:
        """Write the snapshot of the step just taken, if it is due.

        Raises:
            TrainingError: the disk refuses.
        """
        if self._taken is None:  # before the first step
            self.values()
        if self._taken is not None:
            snapshots.write(folder, self._taken)
            self._taken = None

    def _factors(self, adapter: str) -> list[Factors]:
        return snapshots.to_cpu(adapters.factors_of(self._layers, adapter))

    def _gradients(self, adapter: str, factors: Sequence[Factors]) -> list[Factors]:
        """The gradients of these factors; zero on a layer that the loss does not reach."""
        pairs = zip(factors, adapters.gradients_of(self._layers, adapter), strict=True)
        return snapshots.to_cpu(
            [
                f._replace(A=torch.zeros_like(f.A), B=torch.zeros_like(f.B)) if g is None else g
                for f, g in pairs
            ]
        )


def inner_products(one: Sequence[Factors], other: Sequence[Factors]) -> Tensor:
    """<s B A, s' B' A'> of the same layers, (layers,) float64, on the CPU.

    <B A, B' A'> = sum over i, j of (B^T B')_ij (A A'^T)_ij, with matrices of the ranks' sizes only.
    """
    found = torch.empty(len(one), dtype=torch.float64)
    shapes = [(f.A.shape, f.B.shape, g.A.shape) for f, g in zip(one, other, strict=True)]
    for where in alike(shapes):
        grams_A = _stack(one, where, "A") @ _stack(other, where, "A").mT
        grams_B = _stack(one, where, "B").mT @ _stack(other, where, "B")
        scales = torch.tensor([one[i].scale * other[i].scale for i in where], dtype=torch.float64)
        found[where] = (grams_A * grams_B).sum((1, 2)) * scales
    return found


def norms(factors: Sequence[Factors]) -> Tensor:
    """||s B A||_F of each layer, (layers,) float64."""
    return inner_products(factors, factors).clamp_min(0).sqrt()


def perturbation_norms(moved: Sequence[Factors], changes: Sequence[Factors]) -> dict[str, Tensor]:
    """Frobenius norms of the terms of Equation 5, each (layers,).

    Args:
        moved: A + e_A and B + e_B.
        changes: e_A and e_B.
    """
    own = [
        f._replace(A=f.A.double() - e.A.double(), B=f.B.double() - e.B.double())
        for f, e in zip(moved, changes, strict=True)
    ]
    pairs = list(zip(own, changes, strict=True))
    by_A = [f._replace(A=e.A) for f, e in pairs]  # B e_A
    by_B = [f._replace(B=e.B) for f, e in pairs]  # e_B A
    squares = inner_products(by_A, by_A) + inner_products(by_B, by_B)
    first_order = (squares + 2 * inner_products(by_A, by_B)).clamp_min(0).sqrt()
    values = (norms(by_A), norms(by_B), norms(changes), first_order, norms(own))
    return dict(zip((*TERMS, FIRST_ORDER, PRODUCT), values, strict=True))


def ascent_gain(factors: Sequence[Factors], gradients: Sequence[Factors]) -> Tensor:
    """<G, s B A> of each layer, (layers,): how much the adapter raises the loss to first order.

    G is the gradient of the weight, of which dL/dB = s G A^T, so <dL/dB, B> = <G, s B A>.
    """
    return torch.stack(
        [(f.B.double() * g.B.double()).sum() for f, g in zip(factors, gradients, strict=True)]
    )


def alignment(primary: Sequence[Factors], auxiliary: Sequence[Factors]) -> dict[str, Tensor]:
    """Overlaps of column and of row spaces, the cosine of the products, and their norms; each
    (layers,), nan where an adapter is zero.
    """
    one, other = norms(primary), norms(auxiliary)
    return {
        COLUMNS: subspace_overlap([f.B for f in primary], [f.B for f in auxiliary]),
        ROWS: subspace_overlap([f.A.T for f in primary], [f.A.T for f in auxiliary]),
        COSINE: inner_products(primary, auxiliary) / (one * other),
        "norm_primary": one,
        "norm_auxiliary": other,
    }


def subspace_overlap(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Mean squared cosine of the principal angles between column spaces, (layers,) float64.

    ||Q1^T Q2||_F^2 / min(r1, r2), with orthonormal bases: 1 where one space lies in the other, 0
    where they are orthogonal; two random ones in d dimensions have max(r1, r2) / d on average
    (Bjorck & Golub 1973, https://doi.org/10.2307/2005662). The ranks are numerical; nan for 0.

    Args:
        one, other: (d, r1) and (d, r2) of each layer.
    """
    found = torch.empty(len(one), dtype=torch.float64)
    for where in alike((a.shape, b.shape) for a, b in zip(one, other, strict=True)):
        basis, rank = _bases([one[i] for i in where])
        other_basis, other_rank = _bases([other[i] for i in where])
        squares = (basis.mT @ other_basis).square().sum((1, 2))
        found[where] = squares / torch.minimum(rank, other_rank)
    return found


def _bases(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of column spaces, (L, d, r) with zeros beyond the rank, and the ranks."""
    stacked = torch.stack(list(matrices))
    Q, R = torch.linalg.qr(stacked.double())
    U, S, _ = torch.linalg.svd(R)
    # As numpy's matrix_rank: what lies below rounding in the stored precision has no direction.
    share = torch.finfo(stacked.dtype).eps * max(stacked.shape[1:])
    kept = share * S.amax(1, keepdim=True) < S
    return (Q @ U) * kept[:, None, :], kept.sum(1)


def totals(layers: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Figures of all layers together, None where there is none.

    Norms are of all layers as one vector, and so are the ratio of Figure 2b and the cosine; gains
    add up; overlaps are means over the layers that have one.
    """
    found: dict[str, Tensor] = {
        name: values.square().sum().sqrt() for name, values in layers.items() if name in NORMS
    }
    if FIRST_ORDER in layers:
        found[RATIO] = found[FIRST_ORDER] / found[TERMS[-1]]
    if GAIN in layers:
        found[GAIN] = layers[GAIN].sum()
    if COSINE in layers:
        one, other = layers["norm_primary"], layers["norm_auxiliary"]
        products = (layers[COSINE] * one * other).nan_to_num(0)
        found[COSINE] = products.sum() / (found["norm_primary"] * found["norm_auxiliary"])
        found |= {name: layers[name].nanmean() for name in (COLUMNS, ROWS)}
    return {name: float(v) if v.isfinite() else None for name, v in found.items()}


def _stack(factors: Sequence[Factors], where: Sequence[int], side: str) -> Tensor:
    return torch.stack([getattr(factors[i], side).double() for i in where])
