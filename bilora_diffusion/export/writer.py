"""Write LoRA files with their metadata, full models, and PEFT adapters."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import adapters
from ..config.lora_sources import recorded_facts
from ..core.durable import readable_as, replacing, sync
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
from .formats import (
    Layer,
    Part,
    diffusers_tensors,
    kohya_tensors,
    primary_part,
    require_effect,
    trained_layers,
)
from .reader import compare, require_equal

# PEFT's task types of text models.
TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
_SDXL_METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}
# Ends of layer names, and the input width of these layers in SDXL. They identify SDXL, since the
# metadata of files for smaller models of the same class must not name SDXL.
_SDXL_WIDTHS = {
    "unet": (("attn2.to_k", "attn2.to_v"), 2048),
    "text_encoder": (("q_proj", "k_proj", "v_proj"), 768),
    "text_encoder_2": (("q_proj", "k_proj", "v_proj"), 1280),
}


def save_diffusers(
    folder: str | Path,
    models: Mapping[str, nn.Module],
    *,
    base_model: str,
    kohya: bool = False,
    extra_metadata: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Write the file that the pipeline's `load_lora_weights(folder)` reads.

    The scale s = alpha / rank is multiplied into B, and alpha in the file is the rank, so readers
    that ignore alpha are correct too. The alpha of training is in the metadata. If the
    initialization changed the base weights, the file is for the original weights: it has twice the
    rank of training, and the metadata has the rank of training too. Each file is read back and
    compared with the models before it gets its final name.

    Args:
        folder: folder for `pytorch_lora_weights.safetensors`; it is created if necessary.
        models: the trained models by name ("unet" or "transformer", "text_encoder",
            "text_encoder_2") with their adapters; only the primary is written.
        base_model: hub id or folder of the pipeline that was trained.
        kohya: also write a kohya file, named after the folder (`kohya_file_name`), for ComfyUI, web
            UIs and kohya's scripts; for SDXL only. If False, an existing file with this name is
            removed, since its weights are older.
        extra_metadata: further entries (see `training_facts`), which replace the defaults except
            those that describe the tensors.

    Returns:
        "layers" (their number), and "max_abs_difference" and "max_relative_difference" between the
        file and the models; with ``kohya`` also "kohya_max_abs_difference" and
        "kohya_max_relative_difference", the differences of the kohya file.

    Raises:
        UserError: no models are given, a model's name is unknown, `primary_part` refuses a model,
            the folder is a file, or kohya's format is requested for a transformer.
        TrainingError: a value is not finite, every B is zero, or a file differs (`reader.compare`).
    """
    folder = Path(folder)
    unknown_names = [name for name in models if name not in COMPONENTS]
    if unknown_names or not models:
        raise UserError(
            f"{unknown_names or 'no model'} can't be exported; give one or more of"
            f" {', '.join(COMPONENTS)}."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to export to.")
    if kohya:
        refuse_kohya(models)
    parts = {name: primary_part(name, model) for name, model in models.items()}
    kohya_file = folder / kohya_file_name(folder)
    metadata = file_metadata(parts, base_model, kohya_file.stem, extra_metadata or {})
    folder.mkdir(parents=True, exist_ok=True)
    # Removed first, so that an interruption leaves no kohya file with older weights.
    kohya_file.unlink(missing_ok=True)
    expected = {name: trained_layers(model) for name, model in models.items()}
    report = write_file(folder / FILE_NAME, parts, "diffusers", metadata, expected)
    if kohya:
        differences = write_file(kohya_file, parts, "kohya", metadata, expected)
        for name in ("max_abs_difference", "max_relative_difference"):
            report[f"kohya_{name}"] = differences[name]
    return report


def refuse_kohya(components: Iterable[str]) -> None:
    """Raise UserError if kohya's format is requested for a transformer."""
    if "transformer" in components:
        raise UserError(
            "kohya's format is written for SDXL only; for a transformer use the file in diffusers'"
            " format, which ComfyUI reads too for the models that docs/files.md lists."
        )


def write_file(
    path: Path,
    parts: Mapping[str, Part],
    to: str,
    metadata: Mapping[str, str],
    expected: Mapping[str, Sequence[Layer]],
) -> dict[str, float]:
    """Write a temporary file, compare it with the expected layers, and rename it.

    Args:
        path: name of the file.
        parts: the layers of each model.
        to: "diffusers" or "kohya".
        metadata: entries of the file's metadata.
        expected: the layers, by model, that the file must have.

    Returns:
        The result of `reader.compare`.
    """
    tensors = diffusers_tensors(parts) if to == "diffusers" else kohya_tensors(parts)
    entries = {**metadata, "sshs_model_hash": model_hash(tensors)}
    # If a model has several ranks, the entry is left out, and diffusers infers them from the
    # shapes. It refuses a kohya file that has the entry.
    if to == "diffusers" and all(part.file_rank is not None for part in parts.values()):
        entries[ADAPTER_METADATA] = adapter_metadata(parts)
    # No loader reads a file whose name ends in .partial.
    with replacing(path, ".partial") as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, entries))
        return compare(temporary, expected)


def training_facts(config: Mapping[str, Any], steps: int) -> dict[str, str]:
    """Return the metadata of a run with these options, dated today, for `save_diffusers`."""
    init = config["init_lora_weights"]
    guided_target = config.get("guided_target", 1)  # older runs and text runs have no such option
    facts = {
        "method": config["method"],
        "rho": config["rho"],
        "seed": config["seed"],
        "steps": steps,
        "init": None if init == "default" else init,
        # Guidance scale that the weights already include: images are sampled without guidance.
        "guided_target": guided_target if guided_target > 1 else None,
    }
    entries = {
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modelspec.title": Path(config["output_dir"]).resolve().name,
        **lora_metadata(config),
    }
    for name, value in facts.items():
        if value is not None:
            entries[f"bilora.{name}"] = str(value)
    return entries


def lora_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata about the LoRA files that a run with these options was trained with."""
    entries = {}
    for name, value in recorded_facts(config).items():
        entries[f"bilora.{name}"] = str(value)
    return entries


def file_metadata(
    parts: Mapping[str, Part], base_model: str, name: str, extra: Mapping[str, str]
) -> dict[str, str]:
    """Return a file's metadata for both formats; "modelspec" is Stability AI's ModelSpec 1.0.0.

    Args:
        name: name of the file, without its suffix.
        extra: further entries, which replace all others except those that describe the tensors.
    """
    entries: dict[str, str] = {}
    if "transformer" not in parts:
        # The module of kohya's scripts that reads these layer names, which no transformer has.
        entries["ss_network_module"] = "networks.lora"
    if _is_for_sdxl(parts):
        entries |= _SDXL_METADATA
    if base_model:
        entries["ss_sd_model_name"] = base_model
        if Path(base_model).is_dir():
            entries["ss_sd_model_name"] = Path(base_model).name
    entries |= {
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
    }
    # Rank and alpha of training, if known.
    file_ranks = {component: part.file_rank for component, part in parts.items()}
    ranks = {component: part.rank for component, part in parts.items()}
    if None not in ranks.values():
        alphas = {component: part.alpha for component, part in parts.items()}
        entries["bilora.original_alpha"] = json.dumps(alphas)
        if ranks != file_ranks:
            entries["bilora.original_rank"] = json.dumps(ranks)
    entries |= extra
    # Alpha is the rank (B includes the scale). kohya's scripts write "Dynamic" for several ranks.
    rank_text = "Dynamic"
    distinct_ranks = set(file_ranks.values())
    if None not in distinct_ranks and len(distinct_ranks) == 1:
        rank_text = str(distinct_ranks.pop())
    return {**entries, "format": "pt", "ss_network_dim": rank_text, "ss_network_alpha": rank_text}


def _is_for_sdxl(parts: Mapping[str, Part]) -> bool:
    """Return whether the layers of `_SDXL_WIDTHS` exist and have SDXL's widths."""
    matches = []
    for component, part in parts.items():
        if component not in _SDXL_WIDTHS:
            continue
        ends, width = _SDXL_WIDTHS[component]
        for layer in part.layers:
            if layer.name.endswith(ends):
                matches.append(layer.A.shape[1] == width)
    return bool(matches) and all(matches)


def adapter_metadata(parts: Mapping[str, Part]) -> str:
    """Return PEFT's configuration of each primary as JSON; keys begin with the model's name.

    Entries that are left out have PEFT's defaults. Alpha is the rank, since B includes the scale.
    """
    entries: dict[str, Any] = {}
    for component, part in parts.items():
        config = {
            "peft_type": "LORA",
            "r": part.file_rank,
            "lora_alpha": part.file_rank,
            "use_dora": part.use_dora,
            "target_modules": [layer.name for layer in part.layers],
        }
        for name, value in config.items():
            entries[f"{component}.{name}"] = value
    return json.dumps(entries, indent=2, sort_keys=True)


def model_hash(tensors: dict[str, Tensor]) -> str:
    """Compute the sshs_model_hash of kohya's scripts: the SHA-256 of the bytes after the header.

    The hash depends on the tensors in safetensors' order, not on the metadata.
    """
    # A file consists of 8 bytes with the header's length, the header, and the values.
    content = safetensors.torch.save(tensors)
    start_of_values = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[start_of_values:]).hexdigest()


def save_models(folder: str | Path, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Write each model to `folder/name` and compare the files with the model.

    A model is written under a temporary name, compared and renamed; it replaces an older one.

    Args:
        folder: the run folder.
        models: diffusers or Transformers models by their names in the pipeline.

    Returns:
        For each model, "weights" (number of values) and "readback_difference", which is 0.0.

    Raises:
        TrainingError: a weight is not finite, or the files differ from the model.
    """
    report = {}
    for name, model in models.items():
        final = Path(folder) / name
        aside = Path(folder) / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        cast(Any, model).save_pretrained(aside, safe_serialization=True)
        files = list(aside.glob("*.safetensors"))
        readable_as(aside / "config.json", *files)
        stored: dict[str, Tensor] = {}
        for file in files:
            stored |= load_file(file)
        # Buffers are not compared. Transformers writes a tied weight under only one of its names.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stored_ids = {id(value) for key, value in parameters.items() if key in stored}
        stored_parameters = {}
        expected = {}
        for key, value in parameters.items():
            if key in stored:
                stored_parameters[key] = stored[key]
            if key in stored or id(value) not in stored_ids:
                expected[key] = value
        require_equal(final, stored_parameters, expected)
        weights = sum(parameter.numel() for parameter in model.parameters())
        report[name] = {"weights": weights, "readback_difference": 0.0}
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    return report


def save_adapter(
    folder: str | Path,
    model: nn.Module,
    *,
    base_model: str,
    kind: str,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a text model's primary as PEFT's two files.

    Args:
        folder: the run folder.
        model: model with a primary and optionally an auxiliary, which is not written.
        base_model: hub id or folder of the adapter's base model.
        kind: "seq2seq", "causal" or "classification".
        metadata: metadata entries of the weights file.

    Returns:
        "layers" and "parameters" (numbers), "whole_modules" (names of the parameters of modules
        that are trained in full) and "readback_difference", which is 0.0.

    Raises:
        TrainingError: a value is not finite, every B is zero, or a file differs from the model.
    """
    tensors, config = adapters.pretrained_content(model)
    write_adapter(Path(folder), tensors, text_config(config, base_model, kind), metadata)
    return {
        "layers": len(adapters.layers(model, PRIMARY)),
        "parameters": sum(value.numel() for value in tensors.values()),
        "whole_modules": sorted(adapters.head_parameters(model, PRIMARY)),
        "readback_difference": 0.0,
    }


def text_config(config: Mapping[str, Any], base_model: str, kind: str) -> dict[str, Any]:
    """Return an adapter's configuration with PEFT's entries for the base model."""
    return {**config, "base_model_name_or_path": base_model, "task_type": TASK_TYPES[kind]}


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write PEFT's two files to a temporary folder, compare and move them.

    Args:
        check: further check of the weights file, called before the file is moved.

    Raises:
        TrainingError: every B is zero, a value is not finite, the file differs, or `check` fails.
    """
    require_effect("the model", tensors)
    aside = folder / ".adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        adapters.write_pretrained(aside, tensors, config, metadata)
        expected = {adapters.peft_path(key): value for key, value in tensors.items()}
        require_equal(folder / WEIGHTS, load_file(aside / WEIGHTS), expected)
        if check is not None:
            check(aside / WEIGHTS)
        for name in (WEIGHTS, CONFIG):
            sync(aside / name)
            os.replace(aside / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(*folders: Path) -> None:
    """Raise UserError if a folder already has an adapter, or if a path names a file."""
    for folder in folders:
        if folder.suffix == ".safetensors" or folder.is_file():
            raise UserError(f"{folder} names a file, but PEFT's format is a folder; name a folder.")
        for path in (folder / WEIGHTS, folder / CONFIG):
            if path.exists():
                raise UserError(f"{path} exists; name another --output, or delete it.")
