"""Write the primary adapter, and nothing else, as LoRA files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from ..durable import replacing
from ..errors import UserError, did_you_mean
from ..lora_names import (
    ADAPTER_METADATA,
    COMPONENTS,
    FILE_NAME,
    KOHYA_FILE_NAME_BEFORE,
    kohya_file_name,
)
from .kinds import names_of
from .layers import Layer, Part, diffusers_tensors, kohya_tensors, primary_part
from .metadata import adapter_metadata, file_metadata, model_hash

Content = tuple[dict[str, Tensor], dict[str, str]]


def save_diffusers(
    folder: str | Path,
    models: Mapping[str, nn.Module],
    *,
    base_model: str,
    kohya: bool = False,
    extra_metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the file that `load_lora_weights(folder)` of the models' pipeline reads.

    The scale s = alpha / rank is multiplied into B, and alpha in the file is the rank, so that
    readers which ignore alpha are right too; the alpha of training is in the metadata. Where the
    init changed the base weights, the file fits the unchanged ones: it has twice the rank of
    training, which is in the metadata too. Each file appears whole or not at all.

    Args:
        folder: where `pytorch_lora_weights.safetensors` goes; made if need be.
        models: what was trained, by name ("unet" or "transformer", "text_encoder",
            "text_encoder_2"), each with its adapters; only the primary is read.
        base_model: hub id or folder of the pipeline that was trained.
        kohya: also write a file that is named after the folder (`kohya_file_name`) for ComfyUI, web
            UIs and kohya's scripts, which is for SDXL; without it an older such file is removed, as
            its weights differ.
        extra_metadata: more text entries, see `training_facts`; they win over the defaults.

    Returns:
        The path of the diffusers file.

    Raises:
        UserError: an unknown model name, a model without a primary, a folder that is a file, or
            kohya's format for a transformer.
        TrainingError: a value is not finite.
    """
    folder = Path(folder)
    _check(folder, models)
    if kohya:
        refuse_kohya(models)
    parts = {name: primary_part(name, model) for name, model in models.items()}
    kohya_file = folder / kohya_file_name(folder)
    names = names_of(models)
    metadata = file_metadata(parts, names, base_model, kohya_file.stem, extra_metadata or {})
    files = {folder / FILE_NAME: diffusers_content(parts, metadata)}
    if kohya:
        files[kohya_file] = kohya_content(parts, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    for older in (kohya_file, folder / KOHYA_FILE_NAME_BEFORE):
        older.unlink(missing_ok=True)
    for path, (tensors, entries) in files.items():
        write_file(path, tensors, entries)
    return folder / FILE_NAME


def diffusers_content(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> Content:
    """Tensors and metadata of diffusers' file."""
    entries = dict(metadata)
    if all(part.file_rank is not None for part in parts.values()):  # else diffusers reads shapes
        entries[ADAPTER_METADATA] = adapter_metadata(parts)
    return _tensors(diffusers_tensors, parts), entries


def kohya_content(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> Content:
    """Tensors and metadata of kohya's file, of which diffusers refuses one with PEFT's entry."""
    return _tensors(kohya_tensors, parts), dict(metadata)


def _tensors(
    build: Callable[[str, list[Layer]], dict[str, Tensor]], parts: Mapping[str, Part]
) -> dict[str, Tensor]:
    return {
        key: value
        for name, part in parts.items()
        for key, value in build(name, part.layers).items()
    }


def _check(folder: Path, models: Mapping[str, nn.Module]) -> None:
    known = ", ".join(COMPONENTS)
    if not models:
        raise UserError(f"There is no model to export; give one or more of {known}.")
    for name in models:
        if name not in COMPONENTS:
            hint = did_you_mean(name, COMPONENTS)
            raise UserError(
                f'The model name "{name}"{hint} can\'t be exported; use one of {known}.'
            )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to export to.")


def refuse_kohya(components: Iterable[str]) -> None:
    """Refuse kohya's format for what it is not written for.

    Raises:
        UserError: there is a transformer among them.
    """
    if "transformer" in components:
        raise UserError(
            "kohya's format is written for SDXL only; of a transformer use the file in diffusers'"
            " format, which ComfyUI reads too (docs/files.md says of which models)."
        )


def write_file(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write aside under a name that no loader matches, check what is there, rename."""
    entries = {**metadata, "sshs_model_hash": model_hash(tensors)}
    with replacing(path, ".partial") as aside:
        aside.write_bytes(safetensors.torch.save(tensors, entries))
        if check is not None:
            check(aside)
