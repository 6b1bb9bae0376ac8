"""A LoRA file of any format as layers: what conversions start from and are checked by.

The scale alpha / rank is multiplied into B. Tensors keep the precision of the file where that is
exact, as it is for a power of two, and are fp32 otherwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.errors import UserError
from ..core.lora_names import COMPONENTS, ENCODERS
from .layers import Layer, Part, plain_name
from .lorafile import Look, LoraFile, look, require

COMPONENT = "bilora.component"
"""Metadata entry: which model PEFT's file, whose keys do not say it, is for."""
_LARGEST = torch.finfo(torch.float32).max
_BLOCKS = {
    "unet": re.compile(r"(?:down_blocks|mid_block|up_blocks|time_embedding)\.|conv_in|conv_out"),
    "transformer": re.compile(
        r"(?:single_)?transformer_blocks\.|(?:context|noise)_refiner\.|layers\.\d+\.att\w+\.to_"
    ),
}
_RENAMED = (*((f"self_attn.to_{x}", f"self_attn.{x}_proj") for x in "qkv"), ("to_out", "out_proj"))

# Parts of module names: those that hold an underscore, else what lies between two.
_PART = re.compile(
    r"""(?:down_blocks|mid_block|up_blocks|transformer_blocks|to_[qkv]|to_out|proj_in|proj_out
    |conv_in|conv_out|conv_shortcut|time_emb_proj|time_embedding|add_embedding|linear_[12]
    |text_model|text_projection|self_attn|[qkv]_proj|out_proj|layer_norm[12]|final_layer_norm
    |token_embedding|position_embedding)(?=_|$)|[^_]+""",
    re.VERBOSE,
)
# SDXL's original ("sgm") names, which kohya's own scripts write.
_SGM_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_SGM_PARTS = {
    "input_blocks": "down_blocks",
    "middle_block": "mid_block",
    "output_blocks": "up_blocks",
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "downsamplers_0_op": "downsamplers_0_conv",
}
_SGM_BLOCK = re.compile(r"(?:input_blocks_[1-8]|middle_block|output_blocks_[0-8])_[0-2]_")
_PLACE = r"(?:(?:down_blocks\.[0-3]|mid_block)\.KIND\.[01]|up_blocks\.[0-3]\.KIND\.[0-2])"
_UNET = re.compile(
    rf"{_PLACE.replace('KIND', 'attentions')}\.(?:proj_in|proj_out|transformer_blocks\.\d{{1,2}}\."
    r"(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
    rf"|{_PLACE.replace('KIND', 'resnets')}\.(?:conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|down_blocks\.[0-3]\.downsamplers\.0\.conv|up_blocks\.[0-3]\.upsamplers\.0\.conv"
    r"|(?:time|add)_embedding\.linear_[12]|conv_in|conv_out"
)
_ENCODER = re.compile(
    r"text_projection|(?:text_model\.)?(?:embeddings\.(?:token|position)_embedding"
    r"|encoder\.layers\.\d{1,2}\.(?:self_attn\.(?:[qkv]_proj|out_proj|to_[qkv]|to_out)|mlp\.fc[12]))"
)


@dataclass(frozen=True)
class Contents:
    """Contents of a LoRA file.

    Attributes:
        parts: by model: one of `COMPONENTS`, another name in the file, or "model" where the file
            does not say which.
        metadata: of the file.
        base_model: what the adapter belongs on, "" where it is not known.
    """

    parts: dict[str, Part]
    metadata: dict[str, str]
    base_model: str


def read(path: Path) -> Contents:
    """All layers of a LoRA file.

    Raises:
        UserError: it is no LoRA file, is damaged, has more than one adapter for a layer, or holds
            something that is not LoRA's.
    """
    found = look(path)
    file, others = found.file, found.others
    require(not file.auxiliary, path, f"holds more than one adapter ({file.evidence[:1]})")
    what = f"holds {len(others)} tensors that LoRA files of the other formats have no place for"
    require(not others, path, f"{what}, the first is {others[:1]}", "give a plain LoRA")
    described = found.config.get("model") if file.format == "peft" else None
    base = described.base_model_name_or_path if described else None
    parts = _parts(path, found)
    return Contents(parts, file.metadata, base or file.metadata.get("ss_sd_model_name", ""))


def _parts(path: Path, found: Look) -> dict[str, Part]:
    models: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    kohya = set()
    with safe_open(path, framework="pt") as content:
        for entry in found.entries:
            value = content.get_tensor(entry.key)
            # fp16 holds what 8 bits do, and can be computed with
            tensor = value.half() if value.dtype.itemsize == 1 else value
            models[entry.model][entry.name][entry.role] = tensor
            if entry.key.startswith("lora_"):
                kohya.add(entry.model)
    parts: dict[str, dict[str, Layer]] = defaultdict(dict)
    sources: dict[str, str] = {}
    for model, layers in models.items():
        names = module_names(model, layers) if model in kohya else _dotted(layers)
        component = _component(path, model, names.values(), found.file)
        config = found.config.get(component) or found.config.get("model")
        for source, tensors in layers.items():
            name = _canonical(component, names[source])
            full = f"{component}.{name}"
            both = f"has {full} as {sources.get(full)} and as {source}"
            require(sources.setdefault(full, source) is source, path, both, "leave one out")
            rank = len(tensors["A"])
            scale = 1.0 if config is None else config.scale(source, rank)
            if "alpha" in tensors:
                scale = float(tensors["alpha"]) / rank
            parts[component][name] = _layer(path, name, tensors, scale)
    return {component: Part(list(layers.values())) for component, layers in parts.items()}


def _dotted(names: Iterable[str]) -> dict[str, str]:
    """Names as diffusers wrote them before it had PEFT, or as they are."""
    made = {name: name.replace(".processor", "") for name in names}
    return {
        name: f"{now}.0" if now != name and now.endswith(".to_out") else now
        for name, now in made.items()
    }


def _component(path: Path, model: str, names: Iterable[str], file: LoraFile) -> str:
    """The model that an adapter is for, where its keys do not name it."""
    if model != "model":
        return model
    if (stated := file.metadata.get(COMPONENT)) in COMPONENTS:
        return str(stated)
    names = list(names)
    for component, blocks in _BLOCKS.items():
        if any(map(blocks.match, names)):
            return component
    if path.parent.name in COMPONENTS:
        return path.parent.name
    odd = f"has keys of no known format, such as {names[0]}"
    require(file.format != "unknown", path, odd, "give a file in diffusers', kohya's or PEFT's")
    return model


def _canonical(component: str, name: str) -> str:
    """One name for what versions of Transformers and diffusers call differently."""
    if component in ENCODERS:
        name = plain_name(name)
        for old, new in _RENAMED:
            name = name.replace(old, new)
    return name


def _layer(path: Path, name: str, tensors: Mapping[str, Tensor], scale: float) -> Layer:
    A, B, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
    wide = B.double() * scale
    exact = wide.to(B.dtype)
    B = exact if torch.equal(exact.double(), wide) else wide.float()
    for tensor in (A, B, *(() if magnitude is None else (magnitude,))):
        # a comparison that NaN does not pass
        finite = bool(tensor.double().abs().max() <= _LARGEST)
        require(finite, path, f"holds values for {name} that are not finite in fp32")
    terms = B.double().flatten(1).abs().amax(0) * A.double().flatten(1).abs().amax(1)
    large = f"changes {name} by more than fp32 can hold"
    require(bool(terms.sum() <= _LARGEST), path, large)
    if magnitude is not None:
        ones = [1] * (A.dim() - 2)
        magnitude = magnitude.reshape(1, -1, *ones) if ones else magnitude.flatten()
    return Layer(name, A, B, magnitude)


def module_names(model: str, names: Iterable[str]) -> dict[str, str]:
    """Module names of SDXL's UNet or text encoders for flattened ones.

    Those of the UNet may be diffusers' or SDXL's original ones.

    Raises:
        UserError: a name that the model does not have, or both kinds of names.
    """
    flat = {name: name for name in names}
    if model == "unet":
        blocks = [name for name in flat if _SGM_BLOCK.match(name)]
        if blocks and any("down_blocks" in name or "up_blocks" in name for name in flat):
            raise UserError(
                f"The file names layers as SDXL does ({blocks[0]}) and as diffusers does; give a"
                " file with names of one kind."
            )
        flat = {name: _SGM_WHOLE.get(name, name) for name in flat} | _from_blocks(blocks)
    dotted = {name: ".".join(_PART.findall(known)) for name, known in flat.items()}
    known = _UNET if model == "unet" else _ENCODER
    if odd := [name for name, module in dotted.items() if not known.fullmatch(module)]:
        kind = "SDXL's UNet" if model == "unet" else "CLIP's text encoders"
        raise UserError(
            f"{odd[0]} is no layer of {kind}, for which alone kohya's names are known; give a"
            " file in diffusers' or PEFT's format."
        )
    return dotted


def _from_blocks(names: list[str]) -> dict[str, str]:
    """Flattened diffusers' names of what lies in the original UNet's blocks."""
    if not names:
        return {}
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    sdxl = SimpleNamespace(layers_per_block=2)
    counted = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{n}": n for n in names}, sdxl)
    made = {}
    for key, name in counted.items():
        flat = key.removeprefix("lora_unet_")
        for old, new in _SGM_PARTS.items():
            flat = flat.replace(old, new)
        made[name] = flat
    return made
