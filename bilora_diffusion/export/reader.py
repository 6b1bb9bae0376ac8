"""A LoRA file of any format as layers: what conversions start from and are checked by.

The scale alpha / rank is multiplied into B. Tensors keep the precision of the file where that is
exact, as it is for a power of two, and are fp32 otherwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..lora_names import COMPONENTS, ENCODERS
from .entries import ROLES
from .kohya_names import encoder_names, unet_names
from .layers import Layer, Part
from .lorafile import KEY, MODELS, LoraFile, inspect
from .peft_config import PeftConfig, adapter_config

COMPONENT = "bilora.component"
"""Metadata entry: which model PEFT's file, whose keys do not say it, is for."""
_LARGEST = torch.finfo(torch.float32).max
_UNET_BLOCKS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "time_embedding.",
    "conv_in",
    "conv_out",
)
_TRANSFORMER_BLOCKS = re.compile(
    r"(?:single_)?transformer_blocks\.|(?:context|noise)_refiner\.|layers\.\d+\.att\w+\.to_"
)


@dataclass(frozen=True)
class Contents:
    """What a LoRA file holds.

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
    header = inspect(path)
    if header.auxiliary:
        raise UserError(f"{path} holds more than one adapter ({header.evidence[0]}); give another.")
    tensors = _tensors(path)
    config = adapter_config(path, header.metadata, header.format)
    parts = {
        component: _part(path, layers, config.get(component) or config.get("model"))
        for component, layers in _grouped(path, tensors, header).items()
    }
    described = config.get("model") if header.format == "peft" else None
    base = described.base_model_name_or_path if described else None
    return Contents(parts, header.metadata, base or header.metadata.get("ss_sd_model_name", ""))


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a plain LoRA; those of 8 bits in fp16, which holds them and can be computed
    with.
    """
    with safe_open(path, framework="pt") as content:
        keys = list(content.keys())
        if odd := [key for key in keys if not (match := KEY.match(key)) or _not_lora(key, match)]:
            raise UserError(
                f"{path} holds {len(odd)} tensors that LoRA files of the other formats have no"
                f" place for, the first is {odd[0]}; give a plain LoRA."
            )
        tensors = {key: content.get_tensor(key) for key in keys}
    return {k: v.half() if v.dtype.itemsize == 1 else v for k, v in tensors.items()}


def _not_lora(key: str, match: re.Match[str]) -> bool:
    return "embedding" in match["kind"] or key.endswith(".bias")


class _Source(NamedTuple):
    """A layer in the file: its name there, by which PEFT's patterns know it, and its tensors."""

    name: str
    tensors: dict[str, Tensor]  # by role


Grouped = dict[str, dict[str, _Source]]  # by component and the layer's name in the model


def _grouped(path: Path, tensors: Mapping[str, Tensor], header: LoraFile) -> Grouped:
    flat: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    kohya = set()
    for key, value in tensors.items():
        match = KEY.match(key)
        assert match is not None
        prefix = next((prefix for prefix in MODELS if match["layer"].startswith(prefix)), "")
        component = MODELS.get(prefix, "model")
        name = match["layer"].removeprefix(prefix).removeprefix("base_model.model.")
        if prefix.endswith("_"):
            kohya.add(component)
        flat[component][name][ROLES[match["kind"]]] = value
    grouped: Grouped = defaultdict(dict)
    for component, found in flat.items():
        names = _kohya_names(component, found) if component in kohya else _dotted_names(found)
        known = _component(path, component, names.values(), header)
        for name, roles in found.items():
            layer = _canonical(known, names[name])
            other = grouped[known].setdefault(layer, _Source(name, roles))
            if other.tensors is not roles:
                raise UserError(
                    f"{path} has {known}.{layer} as {other.name} and as {name}; leave one out."
                )
    return grouped


def _kohya_names(component: str, found: Mapping[str, Any]) -> dict[str, str]:
    return unet_names(found) if component == "unet" else encoder_names(found)


def _dotted_names(found: Mapping[str, Any]) -> dict[str, str]:
    """Names as diffusers wrote them before it had PEFT, or as they are."""
    names = {}
    for name in found:
        now = name.replace(".processor", "")
        if now != name and now.endswith(".to_out"):
            now += ".0"
        names[name] = now
    return names


def _component(path: Path, component: str, names: Any, header: LoraFile) -> str:
    """Which model an adapter is for, where its keys do not say."""
    if component != "model":
        return component
    if (told := header.metadata.get(COMPONENT)) in COMPONENTS:
        return str(told)
    if any(name.startswith(_UNET_BLOCKS) for name in names):
        return "unet"
    if any(_TRANSFORMER_BLOCKS.match(name) for name in names):
        return "transformer"
    if path.parent.name in COMPONENTS:
        return path.parent.name
    if header.format == "unknown":
        raise UserError(
            f"{path} has keys of no known format, such as {next(iter(names))}; give a file in"
            " diffusers', kohya's or PEFT's."
        )
    return component


def _canonical(component: str, name: str) -> str:
    """One name for what versions of Transformers and diffusers call differently."""
    if component in ENCODERS:
        name = name.removeprefix("text_model.")
        for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj")):
            name = name.replace(f"self_attn.{old}", f"self_attn.{new}")
        name = name.replace("self_attn.to_out", "self_attn.out_proj")
    return name


def _part(path: Path, sources: Mapping[str, _Source], config: PeftConfig | None) -> Part:
    layers = [_layer(path, name, source, config) for name, source in sources.items()]
    return Part(
        layers,
        rank=None,
        alpha=None,
        targets=[layer.name for layer in layers],
        use_dora=any(layer.magnitude is not None for layer in layers),
        fan_in_fan_out=config is not None and config.fan_in_fan_out,
    )


def _layer(path: Path, name: str, source: _Source, config: PeftConfig | None) -> Layer:
    A, B = source.tensors["A"], _scaled(source.tensors["B"], _scale(source, config))
    magnitude = source.tensors.get("magnitude")
    for tensor in (A, B, magnitude):
        # a comparison that NaN does not pass
        if tensor is not None and not tensor.double().abs().max() <= _LARGEST:
            raise UserError(
                f"{path} holds values for {name} that are not finite in fp32; give another."
            )
    terms = B.double().flatten(1).abs().amax(0) * A.double().flatten(1).abs().amax(1)
    if terms.sum() > _LARGEST:
        raise UserError(f"{path} changes {name} by more than fp32 can hold; give another.")
    if magnitude is not None:
        ones = [1] * (A.dim() - 2)
        magnitude = magnitude.reshape(1, -1, *ones) if ones else magnitude.flatten()
    return Layer(name, A, B, magnitude)


def _scale(source: _Source, config: PeftConfig | None) -> float:
    """alpha / rank of a layer, from the file or from PEFT's configuration."""
    rank = source.tensors["A"].shape[0]
    if "alpha" in source.tensors:
        return float(source.tensors["alpha"]) / rank
    return 1.0 if config is None else config.scale(source.name, rank)


def _scaled(B: Tensor, scale: float) -> Tensor:
    wide = B.double() * scale
    exact = wide.to(B.dtype)
    return exact if torch.equal(exact.double(), wide) else wide.float()
