"""LoRA files of any format from another, or from a model as PEFT's folder.

Each is read back and compared before it gets its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from .. import adapters
from ..core.durable import sync
from ..core.errors import UserError
from ..core.lora_names import (
    ADAPTER_METADATA,
    COMPONENTS,
    CONFIG,
    FILE_NAME,
    PRIMARY,
    WEIGHTS,
    kohya_file_name,
)
from ..train.soundness import PICKLES
from .layers import Part
from .lorafile import lora_files
from .readback import compare, require_equal
from .reader import COMPONENT, Contents, read
from .writer import file_metadata, refuse_kohya, write_file

TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
"""PEFT's names for the kinds of model."""
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
    source = Path(source)
    files = lora_files(source)
    several = [read(file) for file in files]  # of PEFT's folders, each of which holds one model
    parts = {name: part for contents in several for name, part in contents.parts.items()}
    file = files[0] if len(files) == 1 else source / WEIGHTS
    # A LoRA is called as its folder where its file has the name that all have.
    named = file.parent if file.name in (FILE_NAME, WEIGHTS) else file.with_suffix("")
    stem = Path(kohya_file_name(named)).stem
    if output is None:
        folder = source if source.is_dir() else source.parent
        name = f"{stem}-peft" if to == "peft" else f"{stem}-{to}.safetensors"
        if to == "kohya" and file.name == FILE_NAME:
            name = kohya_file_name(folder)
        output = folder / name
    contents = Contents(parts, several[0].metadata, several[0].base_model)
    return write(contents, to, Path(output), stem)


def write(contents: Contents, to: str, place: Path, stem: str) -> Path:
    """Write what a file is to hold; see `convert`.

    Args:
        contents: read from a file or a checkpoint.
        stem: what kohya's file is called in a folder.
    """
    parts, known = contents.parts, {k: v for k, v in contents.metadata.items() if k not in _OWN}
    if odd := [name for name in parts if name not in COMPONENTS]:
        what = "a model that PEFT names" if odd[0] == "model" else f'"{odd[0]}"'
        base = f" ({contents.base_model})" if contents.base_model else ""
        raise UserError(
            f"The adapter is for {what}{base}, and only those for models of image pipelines are"
            " converted; use it as it is."
        )
    if to == "peft":
        folders = {name: place / name if len(parts) > 1 else place for name in parts}
        refuse_existing(place, *folders.values())
        for name, folder in folders.items():
            tensors, config = _for_peft(name, parts[name], contents.base_model)
            check = partial(compare, expected={name: parts[name].layers})
            place_adapter(folder, tensors, config, known | {COMPONENT: name}, check)
        return place
    if to == "kohya":
        refuse_kohya(parts)
    path = place
    if place.suffix in PICKLES:
        raise UserError(f"{place} would be a pickle; name a .safetensors file or a folder.")
    if place.suffix != ".safetensors" or place.is_dir():
        path = place / (FILE_NAME if to == "diffusers" else f"{stem}.safetensors")
    if path.exists():
        raise UserError(f"{path} exists; name another --output, or delete it.")
    metadata = file_metadata(parts, contents.base_model, path.stem, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, parts, to, metadata)
    return path


def _for_peft(component: str, part: Part, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration; alpha is the rank of each layer, as B holds the scale."""
    tensors, ranks = {}, {}
    for layer in part.layers:
        name = layer.name
        # As Transformers 5 calls the layers of its two classes, which PEFT's format follows.
        if component == "text_encoder_2" and not name.startswith(("text_model.", "text_proj")):
            name = f"text_model.{name}"
        ranks[name] = layer.A.shape[0]
        tensors |= {f"{name}.lora_A.weight": layer.A, f"{name}.lora_B.weight": layer.B}
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {name: rank for name, rank in ranks.items() if rank != usual}
    config = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": list(ranks),
        "use_dora": part.use_dora,
        "base_model_name_or_path": base or None,
    }
    return tensors, config


def save_adapter(
    folder: str | Path, model: nn.Module, *, base_model: str, kind: str
) -> dict[str, Any]:
    """Write the primary, and a head that was trained with it, and read both back.

    The two files replace older ones; the configuration comes last, without which PEFT loads none.

    Args:
        folder: the run folder.
        model: with a primary; an auxiliary is left out.
        base_model: hub id or folder that the adapter belongs on.
        kind: "seq2seq", "causal" or "classification".

    Returns:
        ``layers``, ``parameters``, ``whole_modules`` and ``readback_difference``, which is 0.0.

    Raises:
        TrainingError: a value is not finite.
    """
    tensors, config = adapters.pretrained(model)
    place_adapter(Path(folder), tensors, described(config, base_model, kind))
    return {
        "layers": len(adapters.layers(model, PRIMARY)),
        "parameters": sum(value.numel() for value in tensors.values()),
        "whole_modules": sorted(adapters.head_parameters(model, PRIMARY)),
        "readback_difference": 0.0,
    }


def described(config: Mapping[str, Any], base_model: str, kind: str) -> dict[str, Any]:
    """An adapter's configuration with what PEFT must know of the model that it belongs on."""
    return {**config, "base_model_name_or_path": base_model, "task_type": TASK_TYPES[kind]}


def place_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], object] = bool,
) -> None:
    """Write an adapter's two files aside, read them back, and give them their names."""
    aside = folder / ".adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        adapters.write_pretrained(aside, tensors, config, metadata)
        expected = {adapters.peft_path(key): value for key, value in tensors.items()}
        require_equal(folder / WEIGHTS, load_file(aside / WEIGHTS), expected)
        check(aside / WEIGHTS)
        for name in (WEIGHTS, CONFIG):
            sync(aside / name)
            os.replace(aside / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(*folders: Path) -> None:
    """Refuse to put an adapter where one is, or where a file is."""
    for folder in folders:
        if folder.suffix == ".safetensors" or folder.is_file():
            raise UserError(f"{folder} is a file, and PEFT's format is a folder; name a folder.")
        for path in (folder / WEIGHTS, folder / CONFIG):
            if path.exists():
                raise UserError(f"{path} exists; name another --output, or delete it.")
