"""The auxiliary of the paper, one for all samples; its ablations; the check of its optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import adapters
from ...adapters import AUXILIARY
from ...core.errors import UserError
from .. import perturb
from . import ball

Layers = Sequence[tuple[str, adapters.LoraLayer]]
"""(path, layer) of the layers of one model."""


class Auxiliary:
    """One auxiliary that acts for all samples: the adapter that the layers hold.

    Subclasses bound it in another way (below) or hold several, one for each sample or group of
    samples (`per_sample`). These are numbered from 0.

    Args:
        layers: of each trained model, those that have the adapter.
        norm_scales: factor on the norm of each layer's B A, model by model (`norm_scales`).

    Attributes:
        count: number of auxiliaries.
        loose_parameters: those of its parameters that no module holds.
    """

    count = 1

    def __init__(self, layers: Sequence[Layers], norm_scales: Sequence[float]) -> None:
        self._layers = [list(model_layers) for model_layers in layers]
        self._norm_scales = norm_scales
        self.loose_parameters: Sequence[nn.Parameter] = ()

    def parameters(self, model: int | None = None) -> list[nn.Parameter]:
        """Parameters for the optimizer, of the model of this number or of all."""
        models = self._layers if model is None else [self._layers[model]]
        parameters: list[nn.Parameter] = []
        for layers in models:
            for _, layer in layers:
                parameters += adapters.weights(layer, AUXILIARY)
        return parameters

    def follow_models(self) -> None:
        """Move to the models' device; called before an optimizer knows the parameters."""

    def around_batch(
        self, samples: Sequence[int | None], snr: Sequence[float]
    ) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of a micro-batch (`Method.around_batch`)."""
        return nullcontext()

    def check_gradients(self) -> None:
        """Refuse a step whose gradients do not say how the auxiliary moves."""

    def forget_gradients(self) -> None:
        """Drop the gradients that no module would drop."""

    def active(self) -> Sequence[int]:
        """Numbers of the auxiliaries that the step moves."""
        return (0,)

    def norm(self) -> Tensor:
        """The total norm over all layers now, 0-d; the largest of several auxiliaries."""
        return ball.frobenius_norm(self.factors())

    def active_norm(self) -> Tensor | None:
        """The mean norm of those auxiliaries that the step's gradient saw, 0-d; None where the last
        projection has it.
        """
        return None

    @torch.no_grad()
    def loss_rise(self, numbers: Sequence[int]) -> Tensor:
        """By how much these auxiliaries raise the step's loss to first order, 0-d.

        That is the sum of <dL/dB, B> over the layers.
        """
        values, gradients = list[Tensor](), list[Tensor]()
        for B, gradient in self._B_and_gradients(numbers):
            values.append(B)
            gradients.append(gradient)
        return perturb.dot(values, gradients)

    def _B_and_gradients(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """B with its gradient, of each layer that the loss reaches."""
        # <G, E> with E = s B A and dL/dB = s G A^T is <dL/dB, B>: A's gradient is not needed.
        for layers in self._layers:
            for _, layer in layers:
                _, B = adapters.weights(layer, AUXILIARY)
                if B.grad is not None:
                    yield ball.full_tensor(B), ball.full_tensor(B.grad)

    def project_(self, numbers: Sequence[int], rho: float | Tensor) -> ball.Projection:
        """Project these auxiliaries onto the ball (Equation 10)."""
        return ball.project_(self.factors(), rho)

    def factors(self) -> list[adapters.Factors]:
        """A and B of each layer, with the factor on its norm as scale."""
        layers = list(chain.from_iterable(self._layers))  # model by model, as the scales are
        factors = []
        named_factors = adapters.factors_of(layers, AUXILIARY)
        for layer_factors, scale in zip(named_factors, self._norm_scales, strict=True):
            factors.append(layer_factors._replace(scale=scale))
        return factors

    def tensors(self, model_names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors for a checkpoint, where they take the place of the layers' own parameters."""
        return {}


def norm_scales(layers: Layers, rho_norm: str, adapter: str = AUXILIARY) -> list[float]:
    """Factor on the norm of each layer's B A: its scale s, or 1 (`--rho_norm unscaled`)."""
    if rho_norm == "unscaled":
        return [1.0] * len(layers)  # Eq. 10 to the letter: the paper leaves s out after Eq. 1
    return [float(layer.scaling[adapter]) for _, layer in layers]


def check_groups(
    optimizer: Optimizer,
    auxiliary: Sequence[nn.Parameter],
    primary: Sequence[nn.Parameter],
    is_ascending: bool,
) -> None:
    """Refuse an optimizer that would not move the adapters as Eq. 9 does.

    Args:
        optimizer: whose groups are checked.
        auxiliary: parameters of the auxiliary, in groups of their own without weight decay.
        primary: parameters of the primary, in groups without `maximize`.
        is_ascending: whether the auxiliary's groups have `maximize`.

    Raises:
        UserError: its groups are not those of `param_groups`.
    """
    fix = "make the optimizer from param_groups() as it is."
    # By identity: `==` of tensors compares their values.
    auxiliary_ids = set(map(id, auxiliary))
    primary_ids = set(map(id, primary))
    # Whatever is in no group would never be trained.
    missing = auxiliary_ids | primary_ids
    for group in optimizer.param_groups:
        ids = set(map(id, group["params"]))
        missing -= ids
        # Groups that were not made by `param_groups` may lack these keys.
        maximize = bool(group.get("maximize", False))
        decay = group.get("weight_decay", 0)
        foreign = ids - auxiliary_ids
        # Weight decay would pull the auxiliary to zero, against its ascent.
        is_right = not foreign and maximize == is_ascending and decay == 0
        if ids & auxiliary_ids and not is_right:
            raise UserError(
                f"The auxiliary's group has maximize={maximize}, weight_decay={decay} and "
                f"{len(foreign)} foreign parameters; {fix}"
            )
        if ids & primary_ids and maximize:
            raise UserError(f"A group with maximize=True holds parameters of the primary; {fix}")
    if missing:
        raise UserError(f"The optimizer lacks {len(missing)} parameters of the adapters; {fix}")


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
