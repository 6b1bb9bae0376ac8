"""LoRA files from one format into another, each read back and compared before it gets its name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..lora_names import (
    ADAPTER_METADATA,
    COMPONENTS,
    ENCODERS,
    FILE_NAME,
    WEIGHTS,
    kohya_file_name,
)
from .comparison import compare
from .kinds import names_by_shape
from .layers import Part
from .lorafile import lora_files
from .metadata import file_metadata
from .reader import COMPONENT, Contents, read
from .writer import diffusers_content, kohya_content, refuse_kohya, write_file

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OWN = (  # metadata that follows from the tensors or from the new file's name
    *("format", ADAPTER_METADATA, COMPONENT, "sshs_model_hash", "sshs_legacy_hash"),
    *("ss_network_dim", "ss_network_alpha", "ss_output_name"),
)


def convert(source: str | Path, to: str, output: str | Path | None = None) -> Path:
    """Write a LoRA file in another format; neither it nor another file is replaced.

    Args:
        source: a LoRA file, a folder that PEFT wrote, or a run folder.
        to: "diffusers", "kohya" or "peft".
        output: a .safetensors file, or a folder for a file of the usual name in it; for PEFT, whose
            format is a folder, that folder, with one in it for each model where there are several.
            By default it lies beside the source.

    Returns:
        What was written.

    Raises:
        UserError: the source can't be read or has no place in the format, or the output exists.
        TrainingError: what was written differs from the source.
    """
    files = lora_files(Path(source))
    contents = joined([read(file) for file in files])
    source, file = Path(source), files[0]
    stem = _stem(source / WEIGHTS if len(files) > 1 else file)
    place = _beside(source, file, to, stem) if output is None else Path(output)
    return write(contents, to, place, stem)


def joined(several: list[Contents]) -> Contents:
    """One content of PEFT's folders, each of which holds one model."""
    parts = {name: part for contents in several for name, part in contents.parts.items()}
    return Contents(parts, several[0].metadata, several[0].base_model)


def _beside(source: Path, file: Path, to: str, stem: str) -> Path:
    """A name of its own beside the source."""
    folder = source if source.is_dir() else source.parent
    if to == "kohya" and file.name == FILE_NAME:
        return folder / kohya_file_name(folder)
    return folder / (f"{stem}-peft" if to == "peft" else f"{stem}-{to}.safetensors")


def _stem(file: Path) -> str:
    """What a LoRA is called: its folder where the file has the name that all have."""
    named = file.parent if file.name in (FILE_NAME, WEIGHTS) else file.with_suffix("")
    return Path(kohya_file_name(named)).stem


def write(contents: Contents, to: str, place: Path, stem: str) -> Path:
    """Write what a file is to hold.

    Args:
        contents: read from a file or a checkpoint.
        to: the format.
        place: a file, or a folder for one of the usual name; for PEFT always a folder.
        stem: what kohya's file is called in a folder.

    Raises:
        UserError: a model has no place in the format, or the output exists.
        TrainingError: what was written differs.
    """
    if to == "peft":
        return _write_peft(contents, place)
    if odd := [name for name in contents.parts if name not in COMPONENTS]:
        what = "a model that PEFT names" if odd[0] == "model" else f'"{odd[0]}"'
        base = f" ({contents.base_model})" if contents.base_model else ""
        raise UserError(
            f"The adapter is for {what}{base}, and files in {to}'s format are written for the"
            " models of image pipelines only; use --to peft."
        )
    if to == "kohya":
        refuse_kohya(contents.parts)
    path = place
    if place.suffix in _PICKLES:
        raise UserError(f"{place} would be a pickle; name a .safetensors file or a folder.")
    if place.suffix != ".safetensors" or place.is_dir():
        path = place / (FILE_NAME if to == "diffusers" else f"{stem}.safetensors")
    if path.exists():
        raise UserError(f"{path} exists; name another --output, or delete it.")
    metadata = _metadata(contents, path.stem)
    build = diffusers_content if to == "diffusers" else kohya_content
    tensors, entries = build(contents.parts, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, entries, functools.partial(_check, contents.parts))
    return path


def _metadata(contents: Contents, name: str) -> dict[str, str]:
    kept = {key: value for key, value in contents.metadata.items() if key not in _OWN}
    names = names_by_shape(contents.parts)  # else what the source says, or nothing
    entries = file_metadata(contents.parts, names, contents.base_model, name, kept)
    return {key: value for key, value in entries.items() if value or key in kept}


def _write_peft(contents: Contents, place: Path) -> Path:
    # here, so that the other formats do not wait for PEFT
    from .peft_folder import place_adapter, refuse_existing

    parts = contents.parts
    folders = {name: place / name if len(parts) > 1 else place for name in parts}
    refuse_existing(place, *folders.values())
    kept = {k: v for k, v in contents.metadata.items() if k not in _OWN}
    for component, folder in folders.items():
        part = parts[component]
        tensors, config = _for_peft(component, part, contents.base_model)
        metadata = kept | ({COMPONENT: component} if component in COMPONENTS else {})
        place_adapter(
            folder, tensors, config, metadata, functools.partial(_check, {component: part})
        )
    return place


def _for_peft(component: str, part: Part, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration; alpha is the rank of each layer, as B holds the scale."""
    layers = [layer._replace(name=_module(component, layer.name)) for layer in part.layers]
    ranks = {layer.name: layer.A.shape[0] for layer in layers}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {name: rank for name, rank in ranks.items() if rank != usual}
    tensors = {}
    for name, A, B, magnitude in layers:
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = magnitude
    config = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": list(ranks),
        "use_dora": part.use_dora,
        "fan_in_fan_out": part.fan_in_fan_out,
        "base_model_name_or_path": base or None,
    }
    return tensors, config


def _module(component: str, name: str) -> str:
    """A layer's name in the installed version of Transformers, which PEFT's format follows."""
    if component not in ENCODERS:
        return name
    plain = name.removeprefix("text_model.")
    inner = _has_inner_model(component == "text_encoder_2")
    return f"text_model.{plain}" if inner and not plain.startswith("text_projection") else plain


@functools.cache
def _has_inner_model(projection: bool) -> bool:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(num_hidden_layers=0)
    with torch.device("meta"):
        made = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return any(name == "text_model" for name, _ in made.named_children())


def _check(parts: Mapping[str, Part], path: Path) -> None:
    """Compare what a file holds with what it was to hold."""
    held = read(path).parts
    compare(
        path,
        {name: part.layers for name, part in parts.items()},
        {name: part.layers for name, part in held.items()},
    )
