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
        self.interval_steps = trainer.cfg.dynamics_steps or -(-trainer.num_steps // SNAPSHOTS)
        self._layers = trainer.method.layers(PRIMARY)
        self._figures: dict[str, Tensor] = {}
        self._snapshot: snapshots.Snapshot | None = None
        trainer.method.on_perturbed = self.perturbed
        # Before a step the gradients are those of all its rows, and the weights are unmoved.
        if AUXILIARY in trainer.method.adapters:
            optimizer.register_step_pre_hook(self._before_step)

    def due(self, step: int) -> bool:
        """Test that a step (0: before training) is recorded; the last one always is."""
        return step % self.interval_steps == 0 or step == self._trainer.num_steps

    def perturbed(self) -> None:
        """Called by LoRA-SAM: the weights hold A + e_A and B + e_B, and their ``.grad`` holds e."""
        if self.due(self._trainer.step + 1):
            perturbed = self._factors(PRIMARY)
            self._figures |= perturbation_norms(perturbed, self._gradients(PRIMARY, perturbed))

    def _before_step(self, *_: Any) -> None:
        if self.due(self._trainer.step + 1):
            factors = self._factors(AUXILIARY)
            self._figures[GAIN] = ascent_gain(factors, self._gradients(AUXILIARY, factors))

    def values(self) -> dict[str, Any]:
        """For the line of the step just taken: totals over layers, {} when nothing is due."""
        step = self._trainer.step
        if not self.due(step):
            return {}
        factors = {adapter: self._factors(adapter) for adapter in self._trainer.method.adapters}
        if AUXILIARY in factors:
            self._figures |= alignment(factors[PRIMARY], factors[AUXILIARY])
        self._snapshot = snapshots.Snapshot(step, factors, self._figures)
        self._figures = {}
        return {"dynamics": totals(self._snapshot.layers)}

    def write(self, folder: Path) -> None:
        """Write the snapshot of the step just taken, if it is due.

        Raises:
            TrainingError: the disk refuses.
        """
        if self._snapshot is None:  # before the first step
            self.values()
        if self._snapshot is not None:
            snapshots.write(folder, self._snapshot)
            self._snapshot = None

    def _factors(self, adapter: str) -> list[Factors]:
        return snapshots.to_cpu(adapters.factors_of(self._layers, adapter))

    def _gradients(self, adapter: str, factors: Sequence[Factors]) -> list[Factors]:
        """The gradients of these factors; zero on a layer that the loss does not reach."""
        gradients = []
        for layer, gradient in zip(
            factors, adapters.gradients_of(self._layers, adapter), strict=True
        ):
            if gradient is None:
                zeros = torch.zeros_like(layer.A), torch.zeros_like(layer.B)
                gradient = layer._replace(A=zeros[0], B=zeros[1])
            gradients.append(gradient)
        return snapshots.to_cpu(gradients)


def inner_products(left: Sequence[Factors], right: Sequence[Factors]) -> Tensor:
    """<s B A, s' B' A'> of the same layers, (layers,) float64, on the CPU.

    <B A, B' A'> = sum over i, j of (B^T B')_ij (A A'^T)_ij, with matrices of the ranks' sizes only.
    """
    products = torch.empty(len(left), dtype=torch.float64)
    shapes = [(f.A.shape, f.B.shape, g.A.shape) for f, g in zip(left, right, strict=True)]
    for indices in alike(shapes):  # layers of one shape at one go
        # A is (layers, r, n) and B (layers, m, r), so both are (layers, r, r').
        grams_A = _stack(left, indices, "A") @ _stack(right, indices, "A").mT
        grams_B = _stack(left, indices, "B").mT @ _stack(right, indices, "B")
        scales = [left[i].scale * right[i].scale for i in indices]
        sums = (grams_A * grams_B).sum((1, 2))
        products[indices] = sums * torch.tensor(scales, dtype=torch.float64)
    return products


def norms(factors: Sequence[Factors]) -> Tensor:
    """||s B A||_F of each layer, (layers,) float64."""
    return inner_products(factors, factors).clamp_min(0).sqrt()


def perturbation_norms(
    perturbed: Sequence[Factors], changes: Sequence[Factors]
) -> dict[str, Tensor]:
    """Frobenius norms of the terms of Equation 5, each (layers,).

    Args:
        perturbed: A + e_A and B + e_B.
        changes: e_A and e_B.
    """
    factors, by_A, by_B = [], [], []
    for layer, change in zip(perturbed, changes, strict=True):
        A = layer.A.double() - change.A.double()
        B = layer.B.double() - change.B.double()
        factors.append(layer._replace(A=A, B=B))
        by_A.append(layer._replace(A=change.A, B=B))  # B e_A
        by_B.append(layer._replace(A=A, B=change.B))  # e_B A
    # ||B e_A + e_B A||^2 = ||B e_A||^2 + ||e_B A||^2 + 2 <B e_A, e_B A>
    squares = inner_products(by_A, by_A) + inner_products(by_B, by_B)
    first_order = (squares + 2 * inner_products(by_A, by_B)).clamp_min(0).sqrt()
    norm_BeA, norm_eBA, norm_eBeA = TERMS
    return {
        norm_BeA: norms(by_A),
        norm_eBA: norms(by_B),
        norm_eBeA: norms(changes),
        FIRST_ORDER: first_order,
        PRODUCT: norms(factors),
    }


def ascent_gain(factors: Sequence[Factors], gradients: Sequence[Factors]) -> Tensor:
    """<G, s B A> of each layer, (layers,): how much the adapter raises the loss to first order.

    G is the gradient of the weight, of which dL/dB = s G A^T, so <dL/dB, B> = <G, s B A>.
    """
    gains = []
    for layer, gradient in zip(factors, gradients, strict=True):
        gains.append((layer.B.double() * gradient.B.double()).sum())
    return torch.stack(gains)


def alignment(primary: Sequence[Factors], auxiliary: Sequence[Factors]) -> dict[str, Tensor]:
    """Overlaps of column and of row spaces, the cosine of the products, and their norms; each
    (layers,), nan where an adapter is zero.
    """
    norm_primary, norm_auxiliary = norms(primary), norms(auxiliary)
    return {
        COLUMNS: subspace_overlap([f.B for f in primary], [f.B for f in auxiliary]),
        ROWS: subspace_overlap([f.A.T for f in primary], [f.A.T for f in auxiliary]),
        COSINE: inner_products(primary, auxiliary) / (norm_primary * norm_auxiliary),
        "norm_primary": norm_primary,
        "norm_auxiliary": norm_auxiliary,
    }


def subspace_overlap(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Mean squared cosine of the principal angles between column spaces, (layers,) float64.

    ||Q1^T Q2||_F^2 / min(r1, r2), with orthonormal bases: 1 where one space lies in the other, 0
    where they are orthogonal; two random ones in d dimensions have max(r1, r2) / d on average
    (Bjorck & Golub 1973, https://doi.org/10.2307/2005662). The ranks are numerical; nan for 0.

    Args:
        left, right: (d, r1) and (d, r2) of each layer.
    """
    overlaps = torch.empty(len(left), dtype=torch.float64)
    for indices in alike((a.shape, b.shape) for a, b in zip(left, right, strict=True)):
        left_basis, left_rank = _bases([left[i] for i in indices])
        right_basis, right_rank = _bases([right[i] for i in indices])
        squares = (left_basis.mT @ right_basis).square().sum((1, 2))
        overlaps[indices] = squares / torch.minimum(left_rank, right_rank)
    return overlaps


def _bases(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of column spaces, (L, d, r) with zeros beyond the rank, and the ranks."""
    stacked = torch.stack(list(matrices))
    Q, R = torch.linalg.qr(stacked.double())  # (L, d, r), (L, r, r)
    U, S, _ = torch.linalg.svd(R)
    # As numpy's matrix_rank: what lies below rounding in the stored precision has no direction.
    rounding = torch.finfo(stacked.dtype).eps * max(stacked.shape[1:])
    has_direction = rounding * S.amax(1, keepdim=True) < S  # (L, r)
    return (Q @ U) * has_direction[:, None, :], has_direction.sum(1)


def totals(layers: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Figures of all layers together, None where there is none.

    Norms are of all layers as one vector, and so are the ratio of Figure 2b and the cosine; gains
    add up; overlaps are means over the layers that have one.
    """
    figures: dict[str, Tensor] = {}
    for name, values in layers.items():
        if name in NORMS:
            figures[name] = values.square().sum().sqrt()
    if FIRST_ORDER in layers:
        figures[RATIO] = figures[FIRST_ORDER] / figures[TERMS[-1]]
    if GAIN in layers:
        figures[GAIN] = layers[GAIN].sum()
    if COSINE in layers:
        # A layer of which one adapter is zero has the inner product 0, and no cosine.
        products = layers[COSINE] * layers["norm_primary"] * layers["norm_auxiliary"]
        norm = figures["norm_primary"] * figures["norm_auxiliary"]
        figures[COSINE] = products.nan_to_num(0).sum() / norm
        figures[COLUMNS] = layers[COLUMNS].nanmean()
        figures[ROWS] = layers[ROWS].nanmean()
    return {name: float(v) if v.isfinite() else None for name, v in figures.items()}


def _stack(factors: Sequence[Factors], indices: Sequence[int], side: str) -> Tensor:
    return torch.stack([getattr(factors[i], side).double() for i in indices])
