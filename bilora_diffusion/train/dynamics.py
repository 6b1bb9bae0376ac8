"""Recording for ``--log_dynamics``: the adapters' factors over time and the auxiliary's effect.

Every ``--dynamics_steps`` steps, and at step 0 and the last step, the main process records

- for every method with adapters: the factors A and B (``snapshots``);
- for LoRA-SAM, while the weights are perturbed: the Frobenius norms of the terms of Equation 5,
  B e_A, e_B A and e_B e_A, of the sum of the first two, and of B A;
- for Bi-LoRA: the first-order ascent gain <G, s B2 A2>, from the gradients of the step, and the
  overlap of the primary's and the auxiliary's subspaces.

Products B A are never formed; Gram matrices in float64 on the CPU are used instead. All norms
include the scale s = alpha / r, so they are in the units of the weights. Without the flag, there is
no `Dynamics` object, no hook and no allocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY, Factors, exact_stack, group_equal
from ..methods.bilora import ball
from ..run import snapshots

# Approximate number of snapshots without ``--dynamics_steps``.
SNAPSHOTS = 40
TERMS = ("norm_BeA", "norm_eBA", "norm_eBeA")
FIRST_ORDER, PRODUCT, RATIO = "norm_first_order", "norm_BA", "ratio"
COLUMNS, ROWS, COSINE, GAIN = "column_overlap", "row_overlap", "product_cosine", "ascent_gain"
PRIMARY_NORM, AUXILIARY_NORM = "norm_primary", "norm_auxiliary"
NORMS = (*TERMS, FIRST_ORDER, PRODUCT, PRIMARY_NORM, AUXILIARY_NORM)


class Dynamics:
    """The recorder of a run in the main process; all processes have the same adapters.

    It must be created before the method binds its own hooks.

    Args:
        trainer: trainer whose steps are recorded.
        optimizer: torch optimizer. The hook on its steps gets unscaled gradients with their
            original sign, and does not run in steps that a gradient scaler skips.

    Attributes:
        interval: steps from one snapshot to the next.
    """

    def __init__(self, trainer: Any, optimizer: Optimizer) -> None:
        self._trainer = trainer
        # Rounded up, so there are at most SNAPSHOTS snapshots besides those of step 0 and the end.
        self.interval = trainer.cfg.dynamics_steps or -(-trainer.num_steps // SNAPSHOTS)
        self._layers = trainer.method.layers
        self._layer_values: dict[str, Tensor] = {}
        self._snapshot: snapshots.Snapshot | None = None
        # LoRA-SAM perturbs the weights within a step, so the method itself must call the function.
        trainer.method.on_perturbed = self.record_perturbation
        if AUXILIARY in trainer.method.adapters:
            optimizer.register_step_pre_hook(self._before_step)

    def is_due(self, step: int) -> bool:
        """Return whether a step is recorded. The last step always is; step 0 is before training."""
        return step % self.interval == 0 or step == self._trainer.num_steps

    def record_perturbation(self) -> None:
        """Record norms while the weights are A + e_A and B + e_B and their ``.grad`` is e."""
        # The trainer counts a step when it ends, so the current step is `step + 1`.
        if self.is_due(self._trainer.step + 1):
            perturbed = self._factors(PRIMARY)
            self._layer_values |= perturbation_norms(perturbed, self._gradients(PRIMARY, perturbed))

    def _before_step(self, *_: Any) -> None:
        """Record the ascent gain; this is a hook of the optimizer."""
        if self.is_due(self._trainer.step + 1):
            factors = self._factors(AUXILIARY)
            self._layer_values[GAIN] = ascent_gain(factors, self._gradients(AUXILIARY, factors))

    def values(self) -> dict[str, Any]:
        """Return totals over the layers for the last step's log; {} if the step is not recorded."""
        step = self._trainer.step
        if not self.is_due(step):
            return {}
        factors = {adapter: self._factors(adapter) for adapter in self._trainer.method.adapters}
        if AUXILIARY in factors:
            self._layer_values |= alignment(factors[PRIMARY], factors[AUXILIARY])
        self._snapshot = snapshots.Snapshot(step, factors, self._layer_values)
        self._layer_values = {}
        return {"dynamics": totals(self._snapshot.layers)}

    def write(self, folder: Path) -> None:
        """Write the snapshot of the last step if it is recorded.

        Raises:
            TrainingError: the file can't be written.
        """
        if self._snapshot is None:  # `values` was not called (step 0), or the step is not recorded
            self.values()
        if self._snapshot is not None:
            snapshots.write(folder, self._snapshot)
            self._snapshot = None

    def _factors(self, adapter: str) -> list[Factors]:
        """Return an adapter's factors in all layers, on the CPU."""
        return snapshots.to_cpu(adapters.factors_of(self._layers, adapter))

    def _gradients(self, adapter: str, factors: Sequence[Factors]) -> list[Factors]:
        """Return the gradients of these factors; zero for a layer that the loss does not use."""
        gradients = []
        layer_gradients = adapters.gradients_of(self._layers, adapter)
        for layer, gradient in zip(factors, layer_gradients, strict=True):
            if gradient is None:
                # A: (rank, in), B: (out, rank)
                gradient = layer._replace(A=torch.zeros_like(layer.A), B=torch.zeros_like(layer.B))
            gradients.append(gradient)
        return snapshots.to_cpu(gradients)


def inner_products(left: Sequence[Factors], right: Sequence[Factors]) -> Tensor:
    """Compute <s B A, s' B' A'> for each layer, (layers,) float64, on the CPU.

    <B A, B' A'> = sum over i, j of (B^T B')_ij (A A'^T)_ij, which needs only matrices of size
    (rank, rank').
    """
    products = torch.empty(len(left), dtype=torch.float64)
    shapes = [(f.A.shape, f.B.shape, g.A.shape) for f, g in zip(left, right, strict=True)]
    # Layers of the same shape are stacked.
    for layers in group_equal(shapes):
        # A A'^T and B^T B', (layers, rank, rank')
        A_left = exact_stack([left[layer].A for layer in layers])
        A_right = exact_stack([right[layer].A for layer in layers])
        B_left = exact_stack([left[layer].B for layer in layers])
        B_right = exact_stack([right[layer].B for layer in layers])
        A_products = A_left @ A_right.mT
        B_products = B_left.mT @ B_right
        scales = [left[layer].scale * right[layer].scale for layer in layers]
        scale = torch.tensor(scales, dtype=torch.float64)
        products[layers] = (A_products * B_products).sum((1, 2)) * scale
    return products


def norms(factors: Sequence[Factors]) -> Tensor:
    """Compute ||s B A||_F of each layer, (layers,) float64."""
    # Rounding can make a square from Gram matrices slightly negative.
    return ball.squared_norms(factors).clamp_min(0).sqrt()


def perturbation_norms(
    perturbed: Sequence[Factors], perturbations: Sequence[Factors]
) -> dict[str, Tensor]:
    """Compute the Frobenius norms of the terms of Equation 5, each (layers,).

    (B + e_B)(A + e_A) = B A + B e_A + e_B A + e_B e_A

    Args:
        perturbed: A + e_A and B + e_B.
        perturbations: e_A and e_B.
    """
    primary = []
    B_eA = []
    eB_A = []
    for moved, e in zip(perturbed, perturbations, strict=True):
        # Recover the weights before the perturbation in float64, since e is small.
        layer = moved._replace(A=moved.A.double() - e.A.double(), B=moved.B.double() - e.B.double())
        primary.append(layer)
        B_eA.append(layer._replace(A=e.A))
        eB_A.append(layer._replace(B=e.B))
    # ||B e_A + e_B A||^2 = ||B e_A||^2 + ||e_B A||^2 + 2 <B e_A, e_B A>
    squares = ball.squared_norms(B_eA) + ball.squared_norms(eB_A)
    first_order = (squares + 2 * inner_products(B_eA, eB_A)).clamp_min(0).sqrt()
    B_eA_name, eB_A_name, eB_eA_name = TERMS
    return {
        B_eA_name: norms(B_eA),
        eB_A_name: norms(eB_A),
        eB_eA_name: norms(perturbations),  # their factors are e_B and e_A
        FIRST_ORDER: first_order,
        PRODUCT: norms(primary),
    }


def ascent_gain(factors: Sequence[Factors], gradients: Sequence[Factors]) -> Tensor:
    """Compute the adapter's first-order increase of the loss, <G, s B A>, per layer, (layers,).

    G is the gradient with respect to the weight. dL/dB = s G A^T, so <dL/dB, B> = <G, s B A>.
    """
    gains = []
    for layer, gradient in zip(factors, gradients, strict=True):
        # B and dL/dB, (out, rank); dL/dB includes the scale s.
        gains.append((layer.B.double() * gradient.B.double()).sum())
    return torch.stack(gains)


def alignment(primary: Sequence[Factors], auxiliary: Sequence[Factors]) -> dict[str, Tensor]:
    """Compute the overlaps of column and row spaces, the cosine of the products, and their norms.

    Each value is (layers,). Overlaps and cosines are nan for a layer with a zero adapter.
    """
    primary_norms, auxiliary_norms = norms(primary), norms(auxiliary)
    # B A writes into the column space of B, (out, rank), and reads the row space of A, (rank, in).
    return {
        COLUMNS: subspace_overlap([f.B for f in primary], [f.B for f in auxiliary]),
        ROWS: subspace_overlap([f.A.T for f in primary], [f.A.T for f in auxiliary]),
        COSINE: inner_products(primary, auxiliary) / (primary_norms * auxiliary_norms),
        PRIMARY_NORM: primary_norms,
        AUXILIARY_NORM: auxiliary_norms,
    }


def subspace_overlap(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Compute the mean squared cosine of the principal angles between column spaces.

    The overlap is ||Q1^T Q2||_F^2 / min(r1, r2), with orthonormal bases Q1 and Q2. It is 1 if one
    space contains the other, 0 if they are orthogonal, and max(r1, r2) / d on average for random
    spaces in d dimensions (Bjorck & Golub 1973, https://doi.org/10.2307/2005662). The ranks are
    numerical ranks; the overlap is nan for rank 0.

    Args:
        left: (d, r1) of each layer.
        right: (d, r2) of each layer.

    Returns:
        The overlap of each layer, (layers,) float64.
    """
    overlaps = torch.empty(len(left), dtype=torch.float64)
    for layers in group_equal((a.shape, b.shape) for a, b in zip(left, right, strict=True)):
        left_basis, left_rank = _bases([left[layer] for layer in layers])
        right_basis, right_rank = _bases([right[layer] for layer in layers])
        # Q1^T Q2, (L, r1, r2): its singular values are the cosines of the principal angles.
        squares = (left_basis.mT @ right_basis).square().sum((1, 2))
        overlaps[layers] = squares / torch.minimum(left_rank, right_rank)
    return overlaps


def _bases(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of column spaces, (L, d, r), and the ranks, (L,).

    Basis vectors beyond the rank are zero.
    """
    stacked = exact_stack(matrices)  # (L, d, r)
    # R, (L, r, r), has the same singular values as Q R, (L, d, r), and is smaller.
    Q, R = torch.linalg.qr(stacked)
    U, S, _ = torch.linalg.svd(R)
    # As in numpy's matrix_rank, singular values below the rounding error of the dtype are ignored.
    eps = torch.finfo(matrices[0].dtype).eps
    threshold = eps * max(stacked.shape[1:]) * S.amax(1, keepdim=True)
    has_direction = threshold < S  # (L, r)
    return (Q @ U) * has_direction[:, None, :], has_direction.sum(1)


def totals(layers: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Return totals over all layers; None for a total that is not finite.

    Norms, the ratio of Figure 2b and the cosine treat all layers as one vector. Gains are summed.
    Overlaps are means over the layers that have one.
    """
    totals_by_name: dict[str, Tensor] = {}
    for name, values in layers.items():
        if name in NORMS:
            totals_by_name[name] = values.square().sum().sqrt()
    if FIRST_ORDER in layers:
        # Figure 2b: ||B e_A + e_B A|| / ||e_B e_A||
        totals_by_name[RATIO] = totals_by_name[FIRST_ORDER] / totals_by_name[TERMS[-1]]
    if GAIN in layers:
        totals_by_name[GAIN] = layers[GAIN].sum()
    if COSINE in layers:
        # A layer's inner product is its cosine times both norms. The sum over the layers is the
        # inner product of all layers as one vector.
        products = (layers[COSINE] * layers[PRIMARY_NORM] * layers[AUXILIARY_NORM]).nan_to_num(0)
        totals_by_name[COSINE] = products.sum() / (
            totals_by_name[PRIMARY_NORM] * totals_by_name[AUXILIARY_NORM]
        )
        # A layer with a zero auxiliary has nan, like every layer before the first step.
        for name in (COLUMNS, ROWS):
            totals_by_name[name] = layers[name].nanmean()
    finite_totals: dict[str, float | None] = {}
    for name, value in totals_by_name.items():
        # A log is strict JSON, which has no nan.
        finite_totals[name] = None
        if value.isfinite():
            finite_totals[name] = float(value)
    return finite_totals
