"""An auxiliary for each sample: sample i sees the auxiliary g(i), which its gradients alone move.

    min over B1, A1, max over all ||B2g A2g||_F <= rho of mean_i L_i(W0 + B1 A1 + B2g(i) A2g(i))

Each auxiliary is one flat parameter of the optimizer for each trained model. An auxiliary whose
samples are not in a step has no gradient, so every optimizer leaves it, its moments and its count
alone. Within `SampleAuxiliaries.around_batch` the auxiliaries of the batch's samples are joined
with the primary for all layers at once, and autograd separates the gradients again
(`adapters.per_sample_factors`). The layers' own parameters of the auxiliary are not used.

A flat parameter holds the A of all layers, then their B^T, with layers of one shape next to each
other. So norms and projections of the auxiliaries of a step take as many operations as those of a
single one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import adapters
from ...adapters import AUXILIARY, PRIMARY, fused
from ...adapters.per_sample_factors import (
    FlatLayout,
    SampleAdapter,
    SampleFactors,
    StackedFactors,
    join_factors,
)
from ...core.errors import UserError
from ...core.values import SAMPLE
from . import ball
from .auxiliary import Auxiliary, Layers

# Largest number of samples for which `--auxiliaries sample` is accepted.
MAX_SAMPLE_COUNT = 512


@dataclass(frozen=True)
class Assignment:
    """The auxiliary that each sample sees.

    Attributes:
        count: number of auxiliaries.
        numbers: number of each sample's auxiliary; empty where sample i sees i % count.
    """

    count: int
    numbers: Sequence[int] = ()

    def auxiliary_of(self, sample: int | None) -> int | None:
        """The number of the auxiliary that a sample sees; None for a row that is no sample."""
        if sample is None:
            return None
        if self.numbers:
            return self.numbers[sample]
        return sample % self.count


def assign(auxiliaries: int | str, sample_names: Sequence[str]) -> Assignment:
    """Deal the samples to auxiliaries in turn, in the order of the samples' names.

    Args:
        auxiliaries: number of auxiliaries, or "sample" for one each.
        sample_names: names of the samples; without any, sample i sees the auxiliary i % count.

    Raises:
        UserError: "sample" with more than `MAX_SAMPLE_COUNT` samples, or without names.
    """
    samples = len(sample_names)
    if auxiliaries == SAMPLE:
        if samples > MAX_SAMPLE_COUNT:
            raise UserError(
                f"auxiliaries {SAMPLE} would keep one for each of {samples} samples, each as large "
                f"as the adapter and its optimizer state; give {MAX_SAMPLE_COUNT} or fewer."
            )
        if not samples:
            raise UserError(
                f"auxiliaries {SAMPLE} needs to know how many samples there are; give that number."
            )
        count = samples
    else:
        count = int(auxiliaries)
        if samples:
            count = min(count, samples)
    # By name, so that the order of files or rows makes no difference. The sort is stable.
    numbers = [0] * samples
    by_name = sorted(range(samples), key=sample_names.__getitem__)
    for place, sample in enumerate(by_name):
        numbers[sample] = place % count
    return Assignment(count, numbers)


@dataclass(frozen=True)
class SampleShare:
    """The part of an auxiliary that one sample of a batch sees."""

    auxiliary: int | None  # its number; None where the sample sees none
    B_factor: float = 1.0


class ModelAuxiliaries:
    """The auxiliaries of one trained model.

    Args:
        layers: the layers that have the adapter.
        scales: factor on the norm of each layer's B A.
        count: number of auxiliaries; all begin with the values of the layers' own.

    Attributes:
        layers: the layers, sorted by shape.
        parameters: a flat parameter for each auxiliary.
        scale_ratio: factor on B, since the product has the scale of `adapter`.
    """

    def __init__(self, layers: Layers, scales: Sequence[float], count: int) -> None:
        factors = adapters.factors_of(layers, AUXILIARY)
        # Layers of one shape become neighbours.
        shapes = [(layer.A.shape, layer.B.shape) for layer in factors]
        order = sorted(range(len(layers)), key=shapes.__getitem__)
        self.layers: list[adapters.LoraLayer] = []
        A: list[Tensor] = []
        B: list[Tensor] = []
        sorted_scales: list[float] = []
        for i in order:
            _path, layer = layers[i]
            self.layers.append(layer)
            A.append(factors[i].A)
            B.append(factors[i].B)
            sorted_scales.append(scales[i])
        self.layout = FlatLayout(A, B)
        flat = self.layout.flatten(A, B)
        # All begin with the same A and B = 0; the first gradients make them differ.
        self.parameters = [nn.Parameter(flat.clone()) for _ in range(count)]
        self._squared_scales = torch.tensor(sorted_scales, dtype=torch.float64).square()

        # All auxiliaries have one rank and scale. Where all primaries have too, both products are
        # computed as one with the primary's scale, and the ratio of the scales goes into B:
        # s1 [B1, B2 s2 / s1] [A1; A2] = s1 B1 A1 + s2 B2 A2.
        rank = len(A[0])
        scale = factors[0].scale
        primary = adapters.factors_of(layers, PRIMARY)
        primary_kinds = {(len(layer.A), layer.scale) for layer in primary}
        if len(primary_kinds) == 1:
            self.adapter = SampleAdapter(AUXILIARY, rank, primary[0].scale, fused_with=[PRIMARY])
        else:
            self.adapter = SampleAdapter(AUXILIARY, rank, scale, fused_with=[])
        self.scale_ratio = scale / self.adapter.scale
        self.adapter.assign_slots(self.layers)

    def acting(self, shares: Sequence[SampleShare]) -> AbstractContextManager[None]:
        """A context within which the samples of a batch see these auxiliaries.

        Args:
            shares: one for each sample, or a single one that all samples see.

        Raises:
            UserError: a layer to which no factors can be added.
        """
        if all(share.auxiliary is None for share in shares):
            return self.adapter.acting(None)
        for layer in self.layers:
            if not isinstance(layer, fused.FusedLayer):
                raise UserError(
                    f"An auxiliary for each sample can't be added in a {type(layer).__name__}; "
                    "leave it out of the target modules, or have one auxiliary (auxiliaries 1)."
                )
        return self.adapter.acting(JoinedFactors(self, shares))

    def primary_stacks(self) -> StackedFactors:
        """The primary's factors in the same stacks."""
        A: list[Tensor] = []
        B: list[Tensor] = []
        for layer in self.layers:
            layer_A, layer_B = adapters.weights(layer, PRIMARY)
            # Matrices, since a 1 x 1 convolution shares its stack with linear layers of its size.
            A.append(layer_A.flatten(1))
            B.append(layer_B.flatten(1))
        return self.layout.stack(A, B)

    def squares(self, numbers: Sequence[int]) -> Tensor:
        """`ball.Squares` of these auxiliaries, (4, layers, auxiliaries)."""
        factors = [self.layout.views(self.parameters[number].data) for number in numbers]
        # Gram matrices of the layers of each shape, (layers, auxiliaries, rank, rank).
        grams_A: list[Tensor] = []
        grams_B: list[Tensor] = []
        for shape in range(len(self.layout.A_shapes)):
            grams_A.append(ball.grams([stacks.A[shape] for stacks in factors]))
        for shape in range(len(self.layout.B_shapes)):
            grams_B.append(ball.grams([stacks.B_transposed[shape] for stacks in factors]))
        squares = ball.squares_of_grams(
            torch.cat(grams_A),  # (layers, auxiliaries, rank, rank)
            torch.cat(grams_B),
            width_A=max(width for _, _, width in self.layout.A_shapes),
            width_B=max(width for _, _, width in self.layout.B_shapes),
            dtype=self.parameters[0].dtype,
        )
        # It stays on the device: a copy in each step would wait for it.
        self._squared_scales = self._squared_scales.to(squares)
        return squares * self._squared_scales[:, None]


class JoinedFactors:
    """The factors that the layers of one model apply to a batch (`BatchFactors`).

    They are computed for all layers at once, when the first layer asks for them.

    Args:
        model: the auxiliaries that the samples see.
        shares: one for each sample, or a single one that all samples see.
    """

    def __init__(self, model: ModelAuxiliaries, shares: Sequence[SampleShare]) -> None:
        self.samples = len(shares)
        self._model = model
        self._shares = shares
        self._computed: dict[tuple[torch.dtype, bool], list[SampleFactors]] = {}

    def layer_factors(self, layer: int, dtype: torch.dtype, with_primary: bool) -> SampleFactors:
        # A layer whose primary PEFT computes asks for the samples' part alone.
        key = (dtype, with_primary)
        if key not in self._computed:
            with torch.enable_grad():  # the pass that asks first may be one without gradients
                layout = self._model.layout
                samples = [layout.views(flat) for flat in self._flat_factors()]
                primary = self._model.primary_stacks() if with_primary else None
                self._computed[key] = join_factors(samples, primary, dtype)
        return self._computed[key][layer]

    def _flat_factors(self) -> list[Tensor]:
        """The flat factors that each sample sees, with its share in B."""
        parameters = self._model.parameters
        numbers = [share.auxiliary for share in self._shares if share.auxiliary is not None]
        # A row that is no sample needs factors of the same shape, here with B = 0.
        placeholder = parameters[numbers[0]].detach()
        B_start = self._model.layout.A_size
        flat_factors: list[Tensor] = []
        for share in self._shares:
            flat: Tensor = placeholder
            factor = 0.0
            if share.auxiliary is not None:
                flat = parameters[share.auxiliary]
                factor = share.B_factor * self._model.scale_ratio
            if factor != 1:
                # In contrast to `*` this saves no tensor, so several backward passes can follow.
                scaled_B = torch.ops.aten.mul.Scalar(flat[B_start:], factor)
                flat = torch.cat((flat[:B_start], scaled_B))
            flat_factors.append(flat)
        return flat_factors


class SampleAuxiliaries(Auxiliary):
    """The auxiliaries of all trained models, one for each sample or group of samples.

    Args:
        layers: of each model, the layers that have the adapter, with whose values all auxiliaries
            begin.
        norm_scales: factor on the norm of each layer's B A, model by model.
        assignment: the auxiliary that each sample sees.
        snr_gamma: a sample sees the share sqrt(min(snr, gamma) / gamma) of its auxiliary; with 0
            always all of it.
    """

    def __init__(
        self,
        layers: Sequence[Layers],
        norm_scales: Sequence[float],
        assignment: Assignment,
        snr_gamma: float = 0.0,
    ) -> None:
        super().__init__(layers, norm_scales)
        self.count = assignment.count
        self.assignment = assignment
        self.snr_gamma = snr_gamma
        self._models: list[ModelAuxiliaries] = []
        start = 0
        for model_layers in layers:
            scales = norm_scales[start : start + len(model_layers)]
            self._models.append(ModelAuxiliaries(model_layers, scales, self.count))
            start += len(model_layers)
        self.loose_parameters = self.parameters()
        device = self._device()
        # Norm of each auxiliary when it was projected last.
        self.norms = torch.zeros(self.count, dtype=ball.wide_dtype(device), device=device)

    def _device(self) -> torch.device:
        _, B = adapters.weights(self._models[0].layers[0], AUXILIARY)
        return B.device

    def parameters(self, model: int | None = None) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = []
        for number, model_auxiliaries in enumerate(self._models):
            if model in (None, number):
                parameters += model_auxiliaries.parameters
        return parameters

    def follow_models(self) -> None:
        # A model may be moved after `setup`. The parameters stay the same objects, so only their
        # data are moved.
        device = self._device()
        self.norms = self.norms.to(device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    @contextmanager
    def around_batch(self, samples: Sequence[int | None], snr: Sequence[float]) -> Iterator[None]:
        """A context within which the rows of a micro-batch see their auxiliaries.

        Row i sees the auxiliary of `samples[i]`, or none, and of it the share that belongs to
        `snr[i]`. The forward and the backward pass run in the same context.

        Raises:
            UserError: a layer to which no factors can be added; ratios of other rows.
        """
        if snr and len(snr) != len(samples):
            raise UserError(f"snr has {len(snr)} ratios for {len(samples)} samples; give one each.")
        shares = []
        for row, sample in enumerate(samples):
            share = 1.0
            if snr and self.snr_gamma:
                # The weight is min-SNR's of a loss (Hang et al. 2023).
                share = math.sqrt(min(snr[row], self.snr_gamma) / self.snr_gamma)
            shares.append(SampleShare(self.assignment.auxiliary_of(sample), share))
        if len(set(shares)) == 1:
            shares = shares[:1]  # all rows see the same: an ordinary product, not a batched one
        with ExitStack() as stack:
            for model in self._models:
                stack.enter_context(model.acting(shares))
            yield

    def check_gradients(self) -> None:
        """Refuse gradients that did not come from a pass within `around_batch`.

        Raises:
            UserError: the layers' own parameters have gradients.
        """
        for model in self._models:
            for layer in model.layers:
                _, B = adapters.weights(layer, AUXILIARY)
                if B.grad is not None:
                    raise UserError(
                        "A backward pass did not say whose samples its rows are, so no auxiliary "
                        "was moved: run it within samples(ids), or give a trainer's data set a "
                        'column "sample_id".'
                    )

    def forget_gradients(self) -> None:
        for parameter in self.loose_parameters:
            parameter.grad = None

    def norm(self) -> Tensor:
        return self.norms.amax()

    def active_norm(self) -> Tensor | None:
        # The last projection was that of other auxiliaries: each step has its own samples.
        return self.norms[self.active()].mean()

    def active(self) -> list[int]:
        # A batch goes through all models, so the first one's gradients tell.
        parameters = self._models[0].parameters
        return [number for number in range(self.count) if parameters[number].grad is not None]

    @torch.no_grad()
    def project_(self, numbers: Sequence[int], rho: float | Tensor) -> ball.Projection:
        """Project each of these auxiliaries onto a ball of its own (Equation 10).

        Returns:
            The largest norms among them, and the least factor.
        """
        squares = torch.cat([model.squares(numbers) for model in self._models], dim=1)
        # (4, layers, auxiliaries) -> (4, auxiliaries): the norm runs over the layers of all models.
        sums = ball.Squares._make(squares.sum(1))
        before, factor = ball.clipping(sums, rho)  # each (auxiliaries,)
        after = before * factor * factor  # since A and B both have the factor
        for model in self._models:
            parameters = [model.parameters[number].data for number in numbers]
            torch._foreach_mul_(parameters, list(factor.to(parameters[0]).unbind()))
        self.norms[numbers] = after
        return ball.Projection(before.amax(), after.amax(), factor.amin())

    def _B_and_gradients(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for model in self._models:
            start = model.layout.A_size
            for number in numbers:
                parameter = model.parameters[number]
                if parameter.grad is not None:
                    # The B^T of all layers lie behind their A.
                    yield parameter.data[start:], parameter.grad[start:]

    def tensors(self, model_names: Sequence[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, model in zip(model_names, self._models, strict=True):
            for number, parameter in enumerate(model.parameters):
                tensors[f"{name}/{AUXILIARY}/{number}"] = parameter.detach()
        return tensors | {f"{AUXILIARY}/norms": self.norms}
