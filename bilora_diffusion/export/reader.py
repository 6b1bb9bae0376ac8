"""A LoRA file of any format as layers: what conversions start from and are checked by.

The scale alpha / rank is multiplied into B. Tensors keep the precision of the file where that is
exact, as it is for a power of two, and are fp32 otherwise.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..lora_names import COMPONENTS, ENCODERS
from .kohya_names import unet_names, with_dots
from .layers import Layer, Part
from .lorafile import DOWN, KEY, MAGNITUDE, MODELS, LoraFile, adapter_config, inspect

COMPONENT = "bilora.component"
"""Metadata entry: which model PEFT's file, whose keys do not say it, is for."""
_UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up")
_ROLES = (
    dict.fromkeys(DOWN, "A") | dict.fromkeys(_UP, "B") | dict.fromkeys(MAGNITUDE, "magnitude")
) | {"alpha": "alpha"}
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
    tensors = load_file(path)
    if odd := [key for key in tensors if not (match := KEY.match(key)) or _not_lora(key, match)]:
        raise UserError(
            f"{path} holds {len(odd)} tensors that LoRA files of the other formats have no place"
            f" for, the first is {odd[0]}; give a plain LoRA."
        )
    grouped = _grouped(path, tensors, header)
    config = adapter_config(path, header.metadata)
    parts = {
        component: _part(path, found, config.get(component) or config.get("model") or {})
        for component, found in grouped.items()
    }
    described = next(iter(config.values()), {}) if header.format == "peft" else {}
    base = described.get("base_model_name_or_path") or header.metadata.get("ss_sd_model_name")
    return Contents(parts, header.metadata, str(base or ""))


def _not_lora(key: str, match: Any) -> bool:
    return match["kind"] not in _ROLES or "embedding" in match["kind"] or key.endswith(".bias")


Grouped = dict[str, dict[str, dict[str, Tensor]]]  # component -> layer -> role -> tensor


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
        flat[component][name][_ROLES[match["kind"]]] = value
    grouped: Grouped = {}
    for component, found in flat.items():
        names = _kohya_names(component, found) if component in kohya else _dotted_names(found)
        known = _component(path, component, names.values(), header)
        grouped[known] = {_canonical(known, names[name]): roles for name, roles in found.items()}
    return grouped


def _kohya_names(component: str, found: Mapping[str, Any]) -> dict[str, str]:
    return unet_names(found) if component == "unet" else {name: with_dots(name) for name in found}


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


def _part(path: Path, found: Mapping[str, Mapping[str, Tensor]], config: dict[str, Any]) -> Part:
    layers = [_layer(path, name, roles, config) for name, roles in found.items()]
    return Part(
        layers,
        rank=None,
        alpha=None,
        targets=[layer.name for layer in layers],
        use_dora=any(layer.magnitude is not None for layer in layers),
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
    )


def _layer(path: Path, name: str, roles: Mapping[str, Tensor], config: dict[str, Any]) -> Layer:
    A, B = roles.get("A"), roles.get("B")
    if A is None or B is None or A.dim() < 2 or B.dim() < 2 or A.shape[0] != B.shape[1]:
        raise UserError(f"{path} lacks a part of {name}, or it does not fit; download it again.")
    for tensor in roles.values():
        if not tensor.double().isfinite().all():
            raise UserError(f"{path} holds values for {name} that are not finite; give another.")
    magnitude = roles.get("magnitude")
    if magnitude is not None:
        if magnitude.numel() != B.shape[0] or (
            magnitude.dim() == 2 and magnitude.shape[1] == B.shape[0] > 1
        ):
            raise UserError(
                f"{path} has DoRA's scale of {name} along the inputs, which diffusers and PEFT"
                " can't do; train it with scales along the outputs."
            )
        ones = [1] * (A.dim() - 2)
        magnitude = magnitude.reshape(1, -1, *ones) if ones else magnitude.flatten()
    return Layer(name, A, _scaled(B, _scale(name, A, roles, config)), magnitude)


def _scale(name: str, A: Tensor, roles: Mapping[str, Tensor], config: dict[str, Any]) -> float:
    """alpha / rank of a layer, from the file or from PEFT's configuration."""
    rank = A.shape[0]
    if "alpha" in roles:
        return float(roles["alpha"]) / rank
    if "lora_alpha" not in config:
        return 1.0
    from peft.utils.other import get_pattern_key

    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _scaled(B: Tensor, scale: float) -> Tensor:
    wide = B.double() * scale
    exact = wide.to(B.dtype)
    return exact if torch.equal(exact.double(), wide) else wide.float()
