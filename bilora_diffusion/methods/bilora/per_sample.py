"""An auxiliary for each sample: sample i sees the auxiliary g(i), which its gradients alone move.

    min over B1, A1, max over all ||B2g A2g||_F <= rho of mean_i L_i(W0 + B1 A1 + B2g(i) A2g(i))

Each auxiliary is one flat parameter of the optimizer for each trained model. One whose samples are
not in a step has no gradient, so every optimizer leaves it, its moments and its count alone. Within
`SampleAuxiliaries.around_batch` the auxiliaries of the batch's samples are joined with the primary
for all layers at once, and autograd separates the gradients again (`adapters.per_sample_factors`).
The layers' own parameters of the auxiliary are not used.

A flat parameter holds the A of all layers, then their B^T, with layers of one shape next to each
other. Norms and projections of the auxiliaries of a step then take as many operations as those of
one.
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
from ..options import MethodOptions
from . import ball
from .auxiliary import Auxiliary, Layers, PerLayerAuxiliary, UnboundedAuxiliary, norm_scales

LARGEST_SAMPLE_COUNT = 512
"""Largest number of samples for which `--auxiliaries sample` is accepted."""


@dataclass(frozen=True)
class Assignment:
    """Which auxiliary each sample sees.

    Attributes:
        count: number of auxiliaries.
        numbers: the auxiliary of each sample; empty where sample i sees i % count.
    """

    count: int
    numbers: Sequence[int] = ()

    def auxiliary_of(self, sample: int | None) -> int | None:
        """The number of the auxiliary that a sample sees; None for a row that is no sample."""
        if sample is None:
            return None
        return self.numbers[sample] if self.numbers else sample % self.count


def assign(auxiliaries: int | str, sample_names: Sequence[str]) -> Assignment:
    """Deal the samples to auxiliaries in turn, in the order of the samples' names.

    Args:
        auxiliaries: number of auxiliaries, or "sample" for one each.
        sample_names: where there are none, sample i sees the auxiliary i % count.

    Raises:
        UserError: "sample" with more than `LARGEST_SAMPLE_COUNT` samples, or without names.
    """
    samples = len(sample_names)
    if auxiliaries == SAMPLE and samples > LARGEST_SAMPLE_COUNT:
        raise UserError(
            f"auxiliaries {SAMPLE} would keep one for each of {samples} samples, each as large "
            f"as the adapter and its optimizer state; give {LARGEST_SAMPLE_COUNT} or fewer."
        )
    if auxiliaries == SAMPLE and not samples:
        raise UserError(
            f"auxiliaries {SAMPLE} needs to know how many samples there are; give that number."
        )
    count = samples if auxiliaries == SAMPLE else int(auxiliaries)
    if samples:
        count = min(count, samples)
    # In turn by name, so that neither the order of files nor that of the rows plays a part.
    numbers = [0] * samples
    by_name = sorted(range(samples), key=lambda sample: (sample_names[sample], sample))
    for place, sample in enumerate(by_name):
        numbers[sample] = place % count
    return Assignment(count, numbers)


def create_auxiliary(
    layers: Sequence[Layers], options: MethodOptions, assignment: Assignment
) -> Auxiliary:
    """The kind of auxiliary that the options ask for, on adapters that are injected already."""
    scales: list[float] = []
    for model_layers in layers:
        scales += norm_scales(model_layers, options.rho_norm)
    if assignment.count > 1:
        return SampleAuxiliaries(layers, scales, assignment, options.auxiliary_snr_gamma)
    kinds = {"global": Auxiliary, "per-layer": PerLayerAuxiliary, "none": UnboundedAuxiliary}
    return kinds[options.ball](layers, scales)


@dataclass(frozen=True)
class SampleShare:
    """What one sample of a batch sees: an auxiliary, or None, and the share of its B."""

    auxiliary: int | None
    share: float = 1.0


class ModelAuxiliaries:
    """The auxiliaries of one trained model.

    Args:
        layers: those that have the adapter.
        scales: factor on the norm of each one's B A.
        count: number of auxiliaries; all begin as the layers' own.

    Attributes:
        layers: the layers, sorted by shape.
        parameters: a flat parameter for each auxiliary.
    """

    def __init__(self, layers: Layers, scales: Sequence[float], count: int) -> None:
        factors = adapters.factors_of(layers, AUXILIARY)
        order = sorted(range(len(layers)), key=lambda i: (factors[i].A.shape, factors[i].B.shape))
        self.layers: list[adapters.LoraLayer] = []
        A, B, norm_scales = list[Tensor](), list[Tensor](), list[float]()
        for i in order:
            self.layers.append(layers[i][1])
            A.append(factors[i].A)
            B.append(factors[i].B)
            norm_scales.append(scales[i])
        self.layout = FlatLayout(A, B)
        flat = self.layout.flatten(A, B)
        # All begin with the same A and B = 0; the first gradients part them.
        self.parameters = [nn.Parameter(flat.clone()) for _ in range(count)]
        self._squared_scales = torch.tensor(norm_scales, dtype=torch.float64).square()

        # All auxiliaries have one rank and scale. Where all primaries have too, both products are
        # computed as one with the primary's scale, and the ratio of the scales goes into B.
        rank, scale = len(A[0]), factors[0].scale
        primary = adapters.factors_of(layers, PRIMARY)
        if len({(len(layer.A), layer.scale) for layer in primary}) == 1:
            self.adapter = SampleAdapter(AUXILIARY, rank, primary[0].scale, fused_with=[PRIMARY])
        else:
            self.adapter = SampleAdapter(AUXILIARY, rank, scale, fused_with=[])
        # s1 [B1, B2 s2 / s1] [A1; A2] = s1 B1 A1 + s2 B2 A2
        self.scale_ratio = scale / self.adapter.scale
        self.adapter.assign_slots(self.layers)

    def acting(self, shares: Sequence[SampleShare]) -> AbstractContextManager[None]:
        """Within the context the samples of a batch see these auxiliaries.

        Args:
            shares: one for each sample, or a single one that all samples see.
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
        """The primary's factors in the same stacks.

        A 1 x 1 convolution shares its stack with linear layers of its size.
        """
        A, B = list[Tensor](), list[Tensor]()
        for layer in self.layers:
            layer_A, layer_B = adapters.weights(layer, PRIMARY)
            A.append(layer_A.flatten(1))
            B.append(layer_B.flatten(1))
        return self.layout.stack(A, B)

    def squares(self, numbers: Sequence[int]) -> Tensor:
        """`ball.Squares` of these auxiliaries, (4, layers, auxiliaries)."""
        stacks_A, stacks_B = list[Sequence[Tensor]](), list[Sequence[Tensor]]()
        for number in numbers:
            stacks = self.layout.views(self.parameters[number].data)
            stacks_A.append(stacks.A)
            stacks_B.append(stacks.B_transposed)
        # Gram matrices of the layers of each shape, (layers, auxiliaries, rank, rank). `zip` turns
        # the stacks of each auxiliary into those of each shape.
        grams_A = [ball.grams(stacks) for stacks in zip(*stacks_A, strict=True)]
        grams_B = [ball.grams(stacks) for stacks in zip(*stacks_B, strict=True)]
        squares = ball.squares_of_grams(
            torch.cat(grams_A),  # (layers, auxiliaries, rank, rank)
            torch.cat(grams_B),
            width_A=max(width for *_, width in self.layout.A_shapes),
            width_B=max(width for *_, width in self.layout.B_shapes),
            dtype=self.parameters[0].dtype,
        )
        # Moved once: a copy in each step would wait for the device.
        self._squared_scales = self._squared_scales.to(squares)
        return squares * self._squared_scales[:, None]


class JoinedFactors:
    """The factors that the layers of one model apply to a batch (`BatchFactors`).

    They are computed for all layers at once, when the first layer asks for them.

    Args:
        model: whose auxiliaries the samples see.
        shares: one for each sample, or a single one that all samples see.
    """

    def __init__(self, model: ModelAuxiliaries, shares: Sequence[SampleShare]) -> None:
        self.samples = len(shares)
        self._model, self._shares = model, shares
        self._computed: dict[tuple[torch.dtype, bool], list[SampleFactors]] = {}

    def layer_factors(self, layer: int, dtype: torch.dtype, with_primary: bool) -> SampleFactors:
        # A layer whose primary PEFT computes asks for the samples' part alone.
        key = (dtype, with_primary)
        if key not in self._computed:
            with torch.enable_grad():  # the pass that asks first may be one without gradients
                layout = self._model.layout
                samples = [layout.views(flat) for flat in self._flat_parameters()]
                primary = self._model.primary_stacks() if with_primary else None
                self._computed[key] = join_factors(samples, primary, dtype)
        return self._computed[key][layer]

    def _flat_parameters(self) -> list[Tensor]:
        """What each sample sees, flat, with its share in B."""
        parameters = self._model.parameters
        numbers = [share.auxiliary for share in self._shares if share.auxiliary is not None]
        # A row that is no sample needs factors of the same shape, here with B = 0.
        placeholder = parameters[numbers[0]].detach()
        flat_parameters = []
        for share in self._shares:
            if share.auxiliary is None:
                flat, factor = placeholder, 0.0
            else:
                flat, factor = parameters[share.auxiliary], share.share
            factor *= self._model.scale_ratio
            if factor != 1:
                start = self._model.layout.A_size
                # In contrast to `*` this keeps no tensor, so several backward passes can follow.
                scaled_B = torch.ops.aten.mul.Scalar(flat[start:], factor)
                flat = torch.cat((flat[:start], scaled_B))
            flat_parameters.append(flat)
        return flat_parameters


class SampleAuxiliaries(Auxiliary):
    """The auxiliaries of all trained models, one for each sample or group of samples.

    Args:
        layers: of each model, those that have the adapter; all auxiliaries begin with its values.
        norm_scales: factor on the norm of each layer's B A, model by model.
        assignment: which auxiliary each sample sees.
        snr_gamma: a sample sees the share sqrt(min(snr, gamma) / gamma); 0: always all of it.
    """

    def __init__(
        self,
        layers: Sequence[Layers],
        norm_scales: Sequence[float],
        assignment: Assignment,
        snr_gamma: float = 0.0,
    ) -> None:
        super().__init__(layers, norm_scales)
        self.count, self.assignment, self.snr_gamma = assignment.count, assignment, snr_gamma
        self._models: list[ModelAuxiliaries] = []
        start = 0
        for model_layers in layers:
            scales = norm_scales[start : start + len(model_layers)]
            self._models.append(ModelAuxiliaries(model_layers, scales, self.count))
            start += len(model_layers)
        # Neither DDP nor model.zero_grad() knows them.
        self.loose_parameters = self.parameters()
        device = self._device()
        # Norm of each auxiliary when it was projected last.
        self.norms = torch.zeros(self.count, dtype=ball.wide(device), device=device)

    def _device(self) -> torch.device:
        _, B = adapters.weights(self._models[0].layers[0], AUXILIARY)
        return B.device

    def parameters(self, model: int | None = None) -> list[nn.Parameter]:
        models = self._models if model is None else [self._models[model]]
        parameters: list[nn.Parameter] = []
        for model_auxiliaries in models:
            parameters += model_auxiliaries.parameters
        return parameters

    def follow_models(self) -> None:
        # A model may be moved after `setup`; `.data`, so that the parameters stay the same objects.
        device = self._device()
        self.norms = self.norms.to(device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    @contextmanager
    def around_batch(self, samples: Sequence[int | None], snr: Sequence[float]) -> Iterator[None]:
        """Within the context, for a forward and a backward pass, row i of a micro-batch sees the
        auxiliary of `samples[i]`, or none, and of it the share that belongs to `snr[i]`.

        Raises:
            UserError: a layer to which no factors can be added; ratios of other rows.
        """
        if snr and len(snr) != len(samples):
            raise UserError(f"snr has {len(snr)} ratios for {len(samples)} samples; give one each.")
        shares = []
        for row, sample in enumerate(samples):
            share = 1.0
            if snr and self.snr_gamma:  # as min-SNR weights a loss (Hang et al. 2023)
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
            parameter.grad = None  # as model.zero_grad() would, did the model hold it

    def norm(self) -> Tensor:
        return self.norms.amax()

    def active_norm(self) -> Tensor | None:
        # Other auxiliaries act in each step, so the last projection has the norm of others.
        return self.norms[self.active()].mean()

    def active(self) -> list[int]:
        # All models have gradients of the same auxiliaries: a batch goes through all of them.
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
        before, factor = ball.clipping(ball.Squares(*squares.sum(1)), rho)  # (auxiliaries,)
        after = before * factor * factor  # A and B are multiplied each
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
