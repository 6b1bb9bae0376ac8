"""The primary adapter as files hold it, and the names that its layers have there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import factors, lora_config, portable_state_dict
from ..core.errors import TrainingError, UserError
from ..core.lora_names import ENCODERS, PRIMARY

_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# Readers of kohya files know these four by SDXL's original names only; all others also by
# diffusers' names.
_SGM_NAME = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class Layer(NamedTuple):
    """One layer's adapter: W + B @ A, then DoRA's magnitude if there is one; on the CPU."""

    name: str
    A: Tensor  # (r, n) or, for a convolution, (r, in_channels, height, width)
    B: Tensor  # (m, r) or (m, r, 1, 1); the trained B times s = alpha / rank
    magnitude: Tensor | None  # (m,) or (1, m, 1, 1)


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
    tensors, config = portable_state_dict(model), lora_config(model, PRIMARY)
    return part_of(component, tensors, config, kinds.pop()[1])


def part_of(
    component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale: float
) -> Part:
    """An adapter's tensors with the scale s = alpha / rank baked into B.

    Where an init took s * B0 @ A0 out of the base weights, A is [A; A0] and B is s * [B, -B0], of
    twice the rank (`portable_state_dict`). s * B is formed in fp64 and rounded once, so it is exact
    where s is a power of two.
    """
    tensors, made = dict(tensors), []
    for name in [key.removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]:
        A, B = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
        magnitude = tensors.pop(f"{name}.lora_magnitude_vector", None)
        layer = Layer(
            plain_name(name),
            _plain(A),
            _plain(B.double() * scale),
            None if magnitude is None else _plain(magnitude),
        )
        if not all(part.isfinite().all() for part in layer[1:] if part is not None):
            raise TrainingError(
                f"The adapter of {component}.{layer.name} is not finite; export a good checkpoint."
            )
        made.append(layer)
    if tensors:
        raise UserError(f"{component} trains {next(iter(tensors))}, which LoRA files do not hold.")
    return Part(made, config["r"], scale * config["r"])


def diffusers_tensors(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Tensors under the keys that diffusers reads.

    Denoisers have PEFT's keys. Text encoders have `lora_linear_layer`, without which diffusers
    can't read adapters that sit on the MLP alone; their magnitudes end in `.weight`, without which
    Transformers leaves them out.
    """
    tensors = {}
    for component, part in parts.items():
        down, up, magnitude = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
        if component in ENCODERS:
            down, up = "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
            magnitude = "lora_magnitude_vector.weight"
        for layer in part.layers:
            name = f"{component}.{_file_name(component, layer.name)}"
            tensors[f"{name}.{down}"] = layer.A
            tensors[f"{name}.{up}"] = layer.B
            if layer.magnitude is not None:
                tensors[f"{name}.{magnitude}"] = layer.magnitude
    return tensors


def kohya_tensors(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Tensors under kohya's keys: lora_down.weight, lora_up.weight, alpha (= rank), dora_scale.

    diffusers leaves out `dora_scale`, gives most layers the most frequent alpha where these differ,
    and can't read text encoders with adapters on some of q, k and v alone; other readers can.
    """
    tensors: dict[str, Tensor] = {}
    for component, part in parts.items():
        for layer in part.layers:
            name = kohya_name(component, layer.name)
            tensors[f"{name}.lora_down.weight"] = layer.A
            tensors[f"{name}.lora_up.weight"] = layer.B
            tensors[f"{name}.alpha"] = torch.tensor(float(len(layer.A)))
            if layer.magnitude is not None:
                ones = [1] * (layer.A.dim() - 1)
                tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *ones)
    return tensors


def kohya_name(component: str, layer: str) -> str:
    """("unet", "mid_block.attentions.0.proj_in") -> "lora_unet_mid_block_attentions_0_proj_in"."""
    name = _file_name(component, _SGM_NAME.get(layer, layer))
    return f"{_KOHYA_PREFIX[component]}_{name}".replace(".", "_")


def plain_name(name: str) -> str:
    """A layer's name without PEFT's prefix, and alike in all versions of Transformers."""
    return name.removeprefix("base_model.model.").removeprefix("text_model.")


def _file_name(component: str, layer: str) -> str:
    """Files keep the `text_model.` that Transformers 5 dropped from CLIPTextModel; readers cope."""
    inner = component in ENCODERS and not layer.startswith("text_projection")
    return f"text_model.{layer}" if inner else layer


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32).contiguous()
