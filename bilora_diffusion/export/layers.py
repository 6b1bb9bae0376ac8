"""The primary adapter of a model as layers: what a file holds, in any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import INITIAL, PRIMARY, factors, lora_config, portable_state_dict, state_dict
from ..core.errors import TrainingError, UserError


class Layer(NamedTuple):
    """One layer's adapter: W + B @ A, then DoRA's magnitude if there is one; on the CPU."""

    name: str
    A: Tensor  # (r, n) or, for a convolution, (r, in_channels, height, width)
    B: Tensor  # (m, r) or (m, r, 1, 1); the trained B times s = alpha / rank
    magnitude: Tensor | None  # (m,) or (1, m, 1, 1)

    @property
    def tensors(self) -> list[Tensor]:
        """A, B and the magnitude where there is one."""
        tensors = [self.A, self.B]
        if self.magnitude is not None:
            tensors.append(self.magnitude)
        return tensors


@dataclass(frozen=True)
class Part:
    """The layers of one model that a file should hold.

    Attributes:
        layers: the primary, for the base weights that the model came with.
        rank, alpha: those of training; None where they are not known.
    """

    layers: list[Layer]
    rank: int | None = None
    alpha: float | None = None

    @property
    def file_rank(self) -> int | None:
        """The rank of all layers in the file; None where they differ."""
        ranks = {layer.A.shape[0] for layer in self.layers}
        return ranks.pop() if len(ranks) == 1 else None

    @property
    def use_dora(self) -> bool:
        """True if the layers have DoRA's magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers)


def primary_part(component: str, model: nn.Module) -> Part:
    """A model's primary for files.

    Raises:
        UserError: there is no primary adapter, its ranks or scales differ, or it trains biases.
        TrainingError: a value is not finite.
    """
    kinds = {(factor.A.shape[0], factor.scale) for factor in factors(model, PRIMARY)}
    if not kinds:
        raise UserError(f'{component} has no adapter "{PRIMARY}"; leave it out of the export.')
    if len(kinds) > 1:
        raise UserError(f"{component} mixes (rank, scale) {sorted(kinds)}; use one for all layers.")
    _, scale = kinds.pop()
    tensors, config = portable_state_dict(model), lora_config(model, PRIMARY)
    return part_of(component, tensors, config, scale)


def part_of(
    component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale: float
) -> Part:
    """An adapter's tensors with the scale s = alpha / rank baked into B.

    Where an init took s * B0 @ A0 out of the base weights, A is [A; A0] and B is s * [B, -B0], of
    twice the rank (`portable_state_dict`). s * B is formed in fp64 and rounded once, so it is exact
    where s is a power of two.
    """
    remaining, layers = dict(tensors), []
    for key in tensors:
        if ".lora_A." not in key:
            continue
        name = key.removesuffix(".lora_A.weight")
        A = remaining.pop(f"{name}.lora_A.weight")
        B = remaining.pop(f"{name}.lora_B.weight")
        magnitude = remaining.pop(f"{name}.lora_magnitude_vector", None)
        if magnitude is not None:
            magnitude = _for_file(magnitude)
        layer = Layer(plain_name(name), _for_file(A), _for_file(B.double() * scale), magnitude)
        if not all(tensor.isfinite().all() for tensor in layer.tensors):
            raise TrainingError(
                f"The adapter of {component}.{layer.name} is not finite; export a good checkpoint."
            )
        layers.append(layer)
    # What is left are biases and whole modules.
    if remaining:
        raise UserError(
            f"{component} trains {next(iter(remaining))}, which LoRA files do not hold."
        )
    return Part(layers, config["r"], scale * config["r"])


def plain_name(name: str) -> str:
    """A layer's name without PEFT's prefix, and alike in all versions of Transformers."""
    return name.removeprefix("base_model.model.").removeprefix("text_model.")


def _for_file(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32).contiguous()


def trained_layers(model: nn.Module) -> list[Layer]:
    """A model's primary by the definition of what it adds, W + s * (B @ A - B0 @ A0), in fp64.

    It shares nothing with `part_of`, which it checks.
    """
    tensors, initial = state_dict(model, PRIMARY), state_dict(model, INITIAL)
    layers = []
    for name, _, _, scale in factors(model, PRIMARY):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        A, B = tensors[down].double(), tensors[up].double()
        if down in initial:
            A = torch.cat((A, initial[down].double()))
            B = torch.cat((B, -initial[up].double()), dim=1)
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        layers.append(Layer(plain_name(name), A, scale * B, magnitude))
    return layers
