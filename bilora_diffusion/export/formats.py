"""Layers of a model's primary, and their names in files of diffusers, kohya and PEFT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import INITIAL, PRIMARY, factors, lora_config, portable_state_dict, state_dict
from ..core.errors import TrainingError, UserError, as_user_error
from ..core.lora_names import ENCODERS
from .lorafile import layer_of_key


class Layer(NamedTuple):
    """A layer's adapter. The adapted weight is W + B @ A, which DoRA rescales."""

    name: str
    A: Tensor  # (r, n) or, for a convolution, (r, in_channels, height, width)
    B: Tensor  # (m, r) or (m, r, 1, 1); the adapter's B times its scale s
    magnitude: Tensor | None  # DoRA's magnitude, (m,) or (1, m, 1, 1)

    @property
    def tensors(self) -> list[Tensor]:
        """A, B and, if there is one, the magnitude."""
        tensors = [self.A, self.B]
        if self.magnitude is not None:
            tensors.append(self.magnitude)
        return tensors


@dataclass(frozen=True)
class Part:
    """The layers of one model in a file."""

    layers: list[Layer]  # for the original base weights
    rank: int | None = None  # rank and alpha of training; None if unknown
    alpha: float | None = None

    @property
    def file_rank(self) -> int | None:
        """The rank of all layers in the file; None if the layers have different ranks."""
        ranks = {layer.A.shape[0] for layer in self.layers}
        if len(ranks) == 1:
            return ranks.pop()
        return None

    @property
    def use_dora(self) -> bool:
        """Whether the layers have DoRA's magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers)


def primary_part(component: str, model: nn.Module) -> Part:
    """Convert a model's primary to layers of a file.

    Raises:
        UserError: there is no primary, its layers have different ranks or scales, or it has biases.
        TrainingError: a value is not finite, or every B is zero.
    """
    kinds = {(factor.A.shape[0], factor.scale) for factor in factors(model, PRIMARY)}
    if not kinds:
        raise UserError(f'{component} has no adapter "{PRIMARY}"; leave it out of the export.')
    if len(kinds) > 1:
        raise UserError(
            f"{component} has layers with different (rank, scale) {sorted(kinds)}; use one rank"
            " and one scale for all layers."
        )
    _, scale = kinds.pop()
    return part_of(component, portable_state_dict(model), lora_config(model, PRIMARY), scale)


def part_of(
    component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale: float
) -> Part:
    """Convert an adapter's tensors to layers, with the scale s = alpha / rank in B.

    If the initialization subtracted s * B0 @ A0 from the base weights, A is [A; A0] and B is s *
    [B, -B0], with twice the rank (`portable_state_dict`).

    Args:
        component: the model's name in the pipeline.
        tensors: the adapter's tensors by PEFT key.
        config: PEFT's configuration in training.
        scale: s.

    Raises:
        UserError: the tensors include biases or whole modules.
        TrainingError: a value is not finite, or every B is zero.
    """
    require_effect(component, tensors)
    remaining = dict(tensors)
    layers = []
    for key in tensors:
        if ".lora_A." not in key:
            continue
        name = key.removesuffix(".lora_A.weight")
        A = remaining.pop(f"{name}.lora_A.weight")
        B = remaining.pop(f"{name}.lora_B.weight")
        magnitude = remaining.pop(f"{name}.lora_magnitude_vector", None)
        if magnitude is not None:
            magnitude = _for_file(magnitude)
        # Computed in fp64 and rounded once, so the result is exact if s is a power of two.
        scaled_B = _for_file(B.double() * scale)
        layer = Layer(plain_name(name), _for_file(A), scaled_B, magnitude)
        if not all(tensor.isfinite().all() for tensor in layer.tensors):
            raise TrainingError(
                f"The adapter of {component}.{layer.name} has values that are not finite; export an"
                " earlier checkpoint."
            )
        layers.append(layer)
    # The remaining tensors are biases of B and modules that are trained in full.
    if remaining:
        raise UserError(
            f"{component} trains {next(iter(remaining))}, which LoRA files can't store."
        )
    return Part(layers, config["r"], scale * config["r"])


def require_effect(component: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that an adapter has an effect: at least one B is not zero.

    Args:
        component: the model's name.
        tensors: the adapter's tensors by PEFT key.

    Raises:
        TrainingError: every B is zero.
    """
    if not any(bool(tensors[key].any()) for key in tensors if ".lora_B." in key):
        raise TrainingError(
            f"The adapter of {component} is not exported, since every B is zero and the adapter"
            " would change nothing: train for more steps, or check --learning_rate and its"
            " schedule."
        )


def plain_name(name: str) -> str:
    """Return a layer's name without PEFT's prefix and without Transformers 4's "text_model."."""
    return name.removeprefix("base_model.model.").removeprefix("text_model.")


def _for_file(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 on the CPU."""
    return tensor.to("cpu", torch.float32).contiguous()


def trained_layers(model: nn.Module) -> list[Layer]:
    """Compute a primary's layers, whose change of W is s * (B @ A - B0 @ A0), in fp64.

    The tensors stay on the model's device. This function calls neither `part_of` nor
    `portable_state_dict`, so that `save_diffusers` can check its files against the result.
    """
    tensors = state_dict(model, PRIMARY)
    initial = state_dict(model, INITIAL)  # A0 and B0, for layers whose initialization changed W
    layers = []
    for name, _, _, scale in factors(model, PRIMARY):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        A, B = tensors[down].double(), tensors[up].double()
        if down in initial:
            A = torch.cat((A, initial[down].double()))  # (2 r, n)
            B = torch.cat((B, -initial[up].double()), dim=1)  # (m, 2 r)
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        layers.append(Layer(plain_name(name), A, scale * B, magnitude))
    return layers


_KOHYA_PREFIX = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
# Readers of kohya files know these four layers only by their original SDXL names. All other layers
# can have diffusers' names.
_ORIGINAL_NAME = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
# diffusers' converter does not insert dots into these names. It converts all others correctly.
_MISREAD_NAME = {
    "add_embedding_linear_1": "add_embedding.linear_1",
    "add_embedding_linear_2": "add_embedding.linear_2",
    "text_model_embeddings_token_embedding": "text_model.embeddings.token_embedding",
    "text_model_embeddings_position_embedding": "text_model.embeddings.position_embedding",
}
_ORIGINAL_BLOCK = re.compile(r"(?:input_blocks_[1-8]|middle_block|output_blocks_[0-8])_[0-2]_")
_OTHER_FORMAT = "give a file in diffusers' or PEFT's format"
# Layers of SDXL's UNet and text encoders. Diffusers' converter accepts other names too, so its
# results are compared with these patterns.
_BLOCK = r"(?:(?:down_blocks\.[0-3]|mid_block)\.KIND\.[01]|up_blocks\.[0-3]\.KIND\.[0-2])"
_UNET_LAYER = re.compile(
    rf"{_BLOCK.replace('KIND', 'attentions')}\.(?:proj_in|proj_out|transformer_blocks\.\d{{1,2}}\."
    r"(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
    rf"|{_BLOCK.replace('KIND', 'resnets')}\.(?:conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|down_blocks\.[0-3]\.downsamplers\.0\.conv|up_blocks\.[0-3]\.upsamplers\.0\.conv"
    r"|(?:time|add)_embedding\.linear_[12]|conv_in|conv_out"
)
_ENCODER_LAYER = re.compile(
    r"text_projection|(?:text_model\.)?(?:embeddings\.(?:token|position)_embedding"
    r"|encoder\.layers\.\d{1,2}\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]))"
)


def _name_in_files(component: str, layer: str) -> str:
    """Return a layer's name in files for diffusers and kohya; CLIP's start with "text_model."."""
    if component in ENCODERS and not layer.startswith("text_projection"):
        return f"text_model.{layer}"
    return layer


def kohya_name(component: str, layer: str) -> str:
    """Return a layer's name in kohya's format.

    ("unet", "mid_block.attentions.0.proj_in") -> "lora_unet_mid_block_attentions_0_proj_in"
    """
    name = _name_in_files(component, _ORIGINAL_NAME.get(layer, layer))
    return _KOHYA_PREFIX[component] + name.replace(".", "_")


def diffusers_tensors(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return tensors with the keys that diffusers reads.

    A denoiser's keys end like PEFT's. A text encoder's keys need `lora_linear_layer`, since
    otherwise diffusers can't read an adapter that has only MLP layers. The keys of a text encoder's
    magnitudes need `.weight`, since otherwise Transformers ignores the magnitudes.
    """
    tensors = {}
    for component, part in parts.items():
        # As in PEFT, the key of a denoiser's magnitude has no ".weight".
        down, up, magnitude = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
        if component in ENCODERS:
            down, up = "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
            magnitude = "lora_magnitude_vector.weight"
        for layer in part.layers:
            name = f"{component}.{_name_in_files(component, layer.name)}"
            tensors[f"{name}.{down}"] = layer.A
            tensors[f"{name}.{up}"] = layer.B
            if layer.magnitude is not None:
                tensors[f"{name}.{magnitude}"] = layer.magnitude
    return tensors


def kohya_tensors(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return tensors with kohya's keys: lora_down.weight, lora_up.weight, alpha, dora_scale.

    Each layer's alpha is its rank. `diffusers.utils.convert_state_dict_to_kohya` is not used, since
    it does not convert DoRA's magnitudes of a UNet or text encoder to `dora_scale`.
    """
    tensors: dict[str, Tensor] = {}
    for component, part in parts.items():
        for layer in part.layers:
            name = kohya_name(component, layer.name)
            tensors[f"{name}.lora_down.weight"] = layer.A
            tensors[f"{name}.lora_up.weight"] = layer.B
            # Readers multiply by alpha / rank, which is 1 here, since B includes the scale.
            tensors[f"{name}.alpha"] = torch.tensor(float(len(layer.A)))
            if layer.magnitude is not None:
                # (m, 1) for a linear layer, (m, 1, 1, 1) for a convolution
                kernel_ones = [1] * (layer.A.dim() - 1)
                tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *kernel_ones)
    return tensors


def peft_adapter(
    component: str, part: Part, base_model: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors with PEFT's keys, and PEFT's configuration, in which alpha is the rank."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer in part.layers:
        name = layer.name
        # Files in PEFT's format use the layer names of Transformers 5.
        if component == "text_encoder_2" and not name.startswith(("text_model.", "text_proj")):
            name = f"text_model.{name}"
        ranks[name] = layer.A.shape[0]
        tensors[f"{name}.lora_A.weight"] = layer.A
        tensors[f"{name}.lora_B.weight"] = layer.B
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    # PEFT's configuration has one rank, and patterns for layers with other ranks.
    ((usual_rank, _),) = Counter(ranks.values()).most_common(1)
    differing_ranks = {name: rank for name, rank in ranks.items() if rank != usual_rank}
    config = {
        "r": usual_rank,
        "lora_alpha": usual_rank,
        "rank_pattern": differing_ranks,
        "alpha_pattern": differing_ranks,
        "target_modules": list(ranks),
        "use_dora": part.use_dora,
        "base_model_name_or_path": base_model or None,
    }
    return tensors, config


def dotted_names(keys: Iterable[str], is_encoder: bool) -> dict[str, str]:
    """Map keys of diffusers or PEFT to the layer names of the current diffusers.

    ["attn1.processor.to_out_lora.down.weight"] -> {...: "attn1.to_out.0"}

    Args:
        keys: keys of the layers' A, without the model's name.
        is_encoder: whether the model is a text encoder.
    """
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    names = {}
    for key in keys:
        # Convert one key at a time, so that two names of the same layer do not become one key. The
        # converters do not use the tensors, so None is enough.
        if is_encoder:
            oldest = StateDictType.DIFFUSERS_OLD  # its table also has all later names
            converted = convert_state_dict_to_peft({key: None}, original_type=oldest)
        else:
            converted = convert_unet_state_dict_to_peft({key: None})
        (new_key,) = converted
        names[key] = layer_of_key(new_key)
    return names


def module_names(component: str, flat_names: Collection[str]) -> dict[str, str]:
    """Map kohya's flat names to module names of SDXL's UNet or text encoders.

    The flat names of the UNet can be diffusers' names or the original SDXL names. Diffusers' loader
    finds the module names. The loader is not used for tensors, since it ignores `dora_scale` and
    gives most layers, such as all attention layers, the most frequent alpha.

    Args:
        component: the model's name in the pipeline.
        flat_names: names without their prefix, such as "mid_block_attentions_0_proj_in".

    Raises:
        UserError: the model does not have a layer of this name, or both kinds of names are mixed.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    # If both kinds of names are mixed, the loader ignores the original ones.
    original_names = [name for name in flat_names if _ORIGINAL_BLOCK.match(name)]
    if original_names and any(name.startswith(("down_blocks", "up_blocks")) for name in flat_names):
        raise UserError(
            f"The file mixes SDXL's original layer names ({original_names[0]}) with diffusers'"
            " names; give a file with one kind of names."
        )
    known_layer, model = _ENCODER_LAYER, "CLIP's text encoders"
    if component == "unet":
        known_layer, model = _UNET_LAYER, "SDXL's UNet"
    # The only field of the UNet's configuration that the loader reads.
    sdxl = SimpleNamespace(layers_per_block=2)
    names = {}
    for name in flat_names:
        module = _MISREAD_NAME.get(name)
        if module is None:
            kohya_key = f"{_KOHYA_PREFIX[component]}{name}"
            # The loader needs tensors; their values do not matter.
            weights = {
                f"{kohya_key}.lora_down.weight": torch.zeros(()),
                f"{kohya_key}.lora_up.weight": torch.zeros(()),
            }
            with as_user_error(f"{name} can't be read as a layer of SDXL", _OTHER_FORMAT):
                state_dict, *_ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
                    weights, unet_config=sdxl
                )
            down_key = next(key for key in state_dict if key.endswith(".down.weight"))
            down_key = down_key.removeprefix(f"{component}.")
            module = dotted_names([down_key], is_encoder=component in ENCODERS)[down_key]
        if not known_layer.fullmatch(module):
            raise UserError(
                f"{name} is not a layer of {model}, and kohya's names are known only for SDXL;"
                f" {_OTHER_FORMAT}."
            )
        names[name] = module
    return names
