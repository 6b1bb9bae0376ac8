"""An adapter whose factors differ from sample to sample of a batch.

A method makes one `SampleAdapter` for a model and gives each layer a `LayerSlot` in it
(`assign_slots`). Within `SampleAdapter.acting` the fused forward (`fused`) adds, for each sample of
the batch, the product of this sample's factors, in place of the adapter that PEFT holds.

B is stored transposed, (rank, out): a product with few columns takes two to four times as long on a
CPU as one with few rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError
from .access import LoraLayer


@dataclass(frozen=True)
class SampleFactors:
    """The factors that one layer applies to the samples of a batch.

    Attributes:
        A: (samples, rank, in), or (rank, in) where all samples share them. Of a convolution `in` is
            in_channels * kernel area.
        B_transposed: (samples, rank, out), or (rank, out).
    """

    A: Tensor
    B_transposed: Tensor


@dataclass(frozen=True)
class StackedFactors:
    """A and B^T of all layers of a model, stacked where neighbours have one shape.

    Attributes:
        A: tensors of (layers, rank, in).
        B_transposed: tensors of (layers, rank, out).
    """

    A: Sequence[Tensor]
    B_transposed: Sequence[Tensor]


class FlatLayout:
    """Layout of a flat parameter: the A of all layers, then their B^T.

    Args:
        A, B: matrices of the layers in their order, (rank, in) and (out, rank).

    Attributes:
        A_shapes, B_shapes: shapes of the tensors of `StackedFactors`.
        A_size: number of elements of all A.
    """

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        self.A_shapes = _stack_shapes(A)
        self.B_shapes = _stack_shapes([matrix.mT for matrix in B])
        self.A_size = sum(matrix.numel() for matrix in A)

    @staticmethod
    def flatten(A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
        """A new flat tensor of these matrices."""
        parts = [matrix.detach().flatten() for matrix in A]
        parts += [matrix.detach().mT.flatten() for matrix in B]  # each as (rank, out)
        return torch.cat(parts)

    def stack(self, A: list[Tensor], B: list[Tensor]) -> StackedFactors:
        """Stack matrices of the layers as in this layout; they may have another rank."""
        A_stacks: list[Tensor] = []
        B_stacks: list[Tensor] = []
        start = 0
        for layers, _rank, _width in self.A_shapes:
            A_stacks.append(torch.stack(A[start : start + layers]))  # (layers, rank, in)
            start += layers
        # Layers that share a shape of A may differ in B's, so B has stacks of its own.
        start = 0
        for layers, _rank, _width in self.B_shapes:
            B_stacks.append(torch.stack(B[start : start + layers]).mT)  # (layers, rank, out)
            start += layers
        return StackedFactors(A_stacks, B_stacks)

    def views(self, flat: Tensor) -> StackedFactors:
        """The factors in a flat tensor, as views."""
        # One `split` for all stacks: autograd joins their gradients in one operation.
        shapes = self.A_shapes + self.B_shapes
        parts = flat.split([math.prod(shape) for shape in shapes])
        stacks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        A_count = len(self.A_shapes)
        return StackedFactors(stacks[:A_count], stacks[A_count:])


def _stack_shapes(matrices: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """(layers, rank, width) of each sequence of neighbours of one shape (rank, width)."""
    stacks: list[tuple[int, int, int]] = []
    for matrix in matrices:
        rank, width = matrix.shape
        layers = 1
        if stacks and stacks[-1][1:] == (rank, width):  # one more layer of the same shape
            layers += stacks.pop()[0]
        stacks.append((layers, rank, width))
    return stacks


def join_factors(
    samples: Sequence[StackedFactors], primary: StackedFactors | None, dtype: torch.dtype
) -> list[SampleFactors]:
    """Join the factors of several samples, layer by layer.

    Args:
        samples: the factors of each sample.
        primary: the primary's factors, which are put above those of each sample.
        dtype: dtype of the result.
    """
    A_by_layer = _join_stacks(
        [factors.A for factors in samples], None if primary is None else primary.A, dtype
    )
    B_by_layer = _join_stacks(
        [factors.B_transposed for factors in samples],
        None if primary is None else primary.B_transposed,
        dtype,
    )
    return [SampleFactors(A, B) for A, B in zip(A_by_layer, B_by_layer, strict=True)]


def _join_stacks(
    samples: Sequence[Sequence[Tensor]], primary: Sequence[Tensor] | None, dtype: torch.dtype
) -> list[Tensor]:
    """Join the stacks of A, or of B^T, of several samples.

    It takes one `cat` for each shape, whatever the number of samples and layers.

    Args:
        samples: stacks (layers, rank, width) of each sample.
        primary: stacks (layers, r1, width), or None for r1 = 0.
        dtype: dtype of the result.

    Returns:
        Of each layer (samples, r1 + rank, width); of a single sample (r1 + rank, width).
    """
    matrices: list[Tensor] = []
    for shape in range(len(samples[0])):
        parts: list[Tensor] = []
        for stacks in samples:
            if primary is not None:
                parts.append(primary[shape])
            parts.append(stacks[shape])
        joined = torch.cat(parts, dim=1)  # (layers, samples * (r1 + rank), width)
        joined = joined.unflatten(1, (len(samples), -1))  # (layers, samples, r1 + rank, width)
        # A single sample leaves (layers, r1 + rank, width): an ordinary product, not a batched one.
        matrices += joined.to(dtype).squeeze(1).unbind()
    return matrices


class BatchFactors(Protocol):
    """The factors of all layers of a model for the samples of one batch."""

    samples: int  # number of samples; 1 where all samples share the same factors

    def layer_factors(self, layer: int, dtype: torch.dtype, with_primary: bool) -> SampleFactors:
        """Factors of one layer, with their graph.

        Args:
            layer: number of the layer (`LayerSlot.number`).
            dtype: precision of the factors.
            with_primary: put the primary's A and B^T above those of each sample.
        """
        ...


class SampleAdapter:
    """An adapter of one model whose factors differ from sample to sample.

    Args:
        name: the adapter of PEFT in whose place the factors act.
        rank: rank of the factors.
        scale: s in s B A.
        fused_with: adapters whose product is computed together with this one's: the primary, or
            none.

    Attributes:
        is_acting: whether the layers use `factors` now in place of PEFT's adapter.
        factors: the factors of the batch; None if no sample of the batch has any.
    """

    def __init__(self, name: str, rank: int, scale: float, fused_with: Sequence[str]) -> None:
        self.name = name
        self.rank = rank
        self.scale = scale
        self.fused_with = list(fused_with)
        self.is_acting = False
        self.factors: BatchFactors | None = None

    @contextmanager
    def acting(self, factors: BatchFactors | None) -> Iterator[None]:
        """Let the layers use these factors in place of PEFT's adapter within the context."""
        self.is_acting = True
        self.factors = factors
        try:
            yield
        finally:
            self.is_acting = False
            self.factors = None

    def assign_slots(self, layers: Sequence[LoraLayer]) -> None:
        """Give each of these layers its slot, with its number in this order."""
        for number, layer in enumerate(layers):
            down = cast(Any, layer).lora_A[self.name]
            cast(Any, layer).sample_slot = LayerSlot(self, number, down)


@dataclass(frozen=True, eq=False)
class LayerSlot:
    """The place of one layer in a `SampleAdapter`.

    Attributes:
        adapter: the adapter of the layer's model.
        number: number of the layer in it.
        down: PEFT's module of A, which has the kernel, stride and padding of a convolution.
    """

    adapter: SampleAdapter
    number: int
    down: nn.Module

    def factors(self, dtype: torch.dtype, with_primary: bool) -> SampleFactors:
        """The layer's factors for the batch; see `BatchFactors.layer_factors`."""
        batch = cast(BatchFactors, self.adapter.factors)
        return batch.layer_factors(self.number, dtype, with_primary)


def acting_slot(layer: Any, inputs: Tensor) -> LayerSlot | None:
    """The slot of a layer in which factors of samples act now; None for another layer.

    Raises:
        UserError: the input does not have one row per sample.
    """
    slot: LayerSlot | None = layer.sample_slot
    if slot is None or not slot.adapter.is_acting:
        return None
    factors = slot.adapter.factors
    # A model may merge rows before a layer, or repeat them; which sample each has is not known.
    if factors is not None and factors.samples not in (1, len(inputs)):
        raise UserError(
            f"A layer with an auxiliary for each sample got {len(inputs)} rows for"
            f" {factors.samples} samples, so the sample of each row is not known; give the samples"
            " one by one (train_batch_size 1)."
        )
    return slot


def add_per_sample_convolution(inputs: Tensor, output: Tensor, slot: LayerSlot) -> Tensor:
    """Add each sample's own low-rank convolution to the output of a layer.

    A grouped convolution applies a different weight to each group of channels, so the samples of
    the batch become groups.

    Args:
        inputs: input of the layer, (samples, in_channels, height, width).
        output: output of the layer so far, (samples, out_channels, height', width').
        slot: the slot of the layer.
    """
    convolution = cast(nn.Conv2d, slot.down)
    batch = cast(BatchFactors, slot.adapter.factors)
    factors = slot.factors(inputs.dtype, with_primary=False)
    groups = batch.samples

    # One group per sample: (1, samples * in_channels, height, width). Where all samples share the
    # factors there is one group, and the samples stay the rows.
    in_channels = convolution.in_channels
    _, _, height, width = inputs.shape
    grouped_inputs = inputs.reshape(-1, groups * in_channels, height, width)

    # A is as large as the layer's kernel: (samples * rank, in_channels, kernel, kernel).
    down_weight = factors.A.reshape(-1, in_channels, *convolution.kernel_size)
    hidden = F.conv2d(
        grouped_inputs,
        down_weight,
        stride=convolution.stride,
        padding=convolution.padding,
        groups=groups,
    )

    # B is a 1 x 1 convolution: (samples * out_channels, rank, 1, 1).
    B = (factors.B_transposed * slot.adapter.scale).mT
    up_weight = B.reshape(-1, slot.adapter.rank, 1, 1)
    return output + F.conv2d(hidden, up_weight, groups=groups).reshape(output.shape)
