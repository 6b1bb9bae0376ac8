"""The auxiliary of the paper, one for all samples, and the ablations of its ball."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from ... import adapters
from ...adapters import AUXILIARY
from .. import perturb
from . import ball

# (path, layer) of the layers of one model.
Layers = Sequence[tuple[str, adapters.LoraLayer]]


class Auxiliary:
    """One auxiliary for all samples: the adapter that the layers hold.

    Subclasses bound it in another way (below), or hold several auxiliaries, one for each sample or
    group of samples (`per_sample`). These are numbered from 0.

    Args:
        layers: of each trained model, the layers that have the adapter.
        norm_scales: factor on the norm of each layer's B A, model by model (`norm_scales`).

    Attributes:
        count: number of auxiliaries.
        loose_parameters: its parameters that no module holds.
    """

    count = 1

    def __init__(self, layers: Sequence[Layers], norm_scales: Sequence[float]) -> None:
        self._layers = [list(model_layers) for model_layers in layers]
        self._norm_scales = norm_scales
        self.loose_parameters: Sequence[nn.Parameter] = ()

    def parameters(self, model: int | None = None) -> list[nn.Parameter]:
        """Parameters for the optimizer.

        Args:
            model: number of the model that has them; None for all models.
        """
        parameters: list[nn.Parameter] = []
        for number, layers in enumerate(self._layers):
            if model in (None, number):
                for _, layer in layers:
                    parameters += adapters.weights(layer, AUXILIARY)
        return parameters

    def follow_models(self) -> None:
        """Move to the models' device; `param_groups` calls it, before an optimizer is made."""

    def around_batch(
        self, samples: Sequence[int | None], snr: Sequence[float]
    ) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of a micro-batch (`Method.around_batch`)."""
        return nullcontext()

    def check_gradients(self) -> None:
        """Refuse a step whose gradients do not say how the auxiliary moves."""

    def forget_gradients(self) -> None:
        """Clear the gradients of `loose_parameters`."""

    def active(self) -> Sequence[int]:
        """Numbers of the auxiliaries that the step moves."""
        return (0,)

    def norm(self) -> Tensor:
        """The total norm over all layers, 0-d; the largest of several auxiliaries."""
        return ball.frobenius_norm(self.factors())

    def active_norm(self) -> Tensor | None:
        """The mean norm of the auxiliaries that the step's gradient saw, 0-d.

        Returns:
            None where it is the norm of the last projection.
        """
        return None

    @torch.no_grad()
    def ascent_gain(self, numbers: Sequence[int]) -> Tensor:
        """<G, E>, by which these auxiliaries raise the step's loss to first order, 0-d.

        It is the sum of <dL/dB, B> over the layers.
        """
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        for B, gradient in self._B_and_gradients(numbers):
            values.append(B)
            gradients.append(gradient)
        return perturb.dot(values, gradients)

    def _B_and_gradients(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """B and its gradient, of each layer that the loss reaches."""
        # With E = s B A and dL/dB = s G A^T, <G, E> = <dL/dB, B>: A's gradient is not needed.
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
        factors: list[adapters.Factors] = []
        adapter_factors = adapters.factors_of(layers, AUXILIARY)
        for layer_factors, scale in zip(adapter_factors, self._norm_scales, strict=True):
            factors.append(layer_factors._replace(scale=scale))
        return factors

    def tensors(self, model_names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors for a checkpoint, if they replace the layers' own parameters; else none."""
        return {}


def norm_scales(layers: Layers, rho_norm: str, adapter: str = AUXILIARY) -> list[float]:
    """Factor on the norm of each layer's B A: its scale s, or 1 (`--rho_norm unscaled`)."""
    if rho_norm == "unscaled":
        return [1.0] * len(layers)  # Eq. 10 to the letter: the paper leaves s out after Eq. 1
    return [float(layer.scaling[adapter]) for _, layer in layers]


class UnboundedAuxiliary(Auxiliary):
    """An auxiliary without a ball (`--ball none`)."""

    def project_(self, numbers: Sequence[int], rho: float | Tensor) -> ball.Projection:
        # For the log, which shows how large it becomes without Eq. 10.
        norm = self.norm()
        return ball.Projection(before=norm, after=norm, factor=torch.ones_like(norm))


class PerLayerAuxiliary(Auxiliary):
    """An auxiliary clipped to rho / sqrt(layers) in each layer (`--ball per-layer`)."""

    @torch.no_grad()
    def project_(self, numbers: Sequence[int], rho: float | Tensor) -> ball.Projection:
        factors = self.factors()
        squares = ball.squares(factors)
        if isinstance(rho, Tensor):  # that of `--rho auto` may be on another device
            rho = rho.to(squares.norm)
        # The sum of (rho / sqrt(layers))^2 over the layers is rho^2.
        norms, factor = ball.clipping(squares, rho / math.sqrt(len(factors)))  # each (layers,)
        ball.multiply_(factors, factor)
        after = (norms * factor * factor).norm()
        return ball.Projection(before=squares.joint_norm(), after=after, factor=factor.amin())
