"""Write what was trained as LoRA files or whole models, and what LoRA files say of themselves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.durable import readable_as, replacing
from ..core.errors import UserError
from ..core.lora_names import (
    ADAPTER_METADATA,
    COMPONENTS,
    FILE_NAME,
    KOHYA_FILE_NAME_BEFORE,
    kohya_file_name,
)
from .layers import Part, diffusers_tensors, kohya_tensors, primary_part
from .readback import compare, require_equal

_SDXL = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}
# Which layers read as many numbers as SDXL's attention does: a file for a smaller model of its kind
# must not be offered to it.
_SDXL_READS = {
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
    folder, odd = Path(folder), [name for name in models if name not in COMPONENTS]
    if odd or not models:
        known = ", ".join(COMPONENTS)
        raise UserError(f"{odd or 'no model'} can't be exported; give one or more of {known}.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to export to.")
    if kohya:
        refuse_kohya(models)
    parts = {name: primary_part(name, model) for name, model in models.items()}
    kohya_file = folder / kohya_file_name(folder)
    metadata = file_metadata(parts, base_model, kohya_file.stem, extra_metadata or {})
    folder.mkdir(parents=True, exist_ok=True)
    for older in (kohya_file, folder / KOHYA_FILE_NAME_BEFORE):
        older.unlink(missing_ok=True)
    write_file(folder / FILE_NAME, parts, "diffusers", metadata)
    if kohya:
        write_file(kohya_file, parts, "kohya", metadata)
    return folder / FILE_NAME


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


def write_file(path: Path, parts: Mapping[str, Part], to: str, metadata: Mapping[str, str]) -> None:
    """Write aside under a name that no loader matches, check what is there, rename."""
    tensors = diffusers_tensors(parts) if to == "diffusers" else kohya_tensors(parts)
    entries = {**metadata, "sshs_model_hash": model_hash(tensors)}
    # Of several ranks diffusers reads shapes; and it refuses a file of kohya's with PEFT's entry.
    if to == "diffusers" and all(part.file_rank is not None for part in parts.values()):
        entries[ADAPTER_METADATA] = adapter_metadata(parts)
    with replacing(path, ".partial") as aside:
        aside.write_bytes(safetensors.torch.save(tensors, entries))
        compare(aside, {name: part.layers for name, part in parts.items()})


def training_facts(config: Mapping[str, Any], steps: int) -> dict[str, str]:
    """Entries for `save_diffusers(extra_metadata=...)` of a run with these options, today."""
    init = config["init_lora_weights"]
    facts = {name: config[name] for name in ("method", "rho", "seed")}
    facts |= {"steps": steps, "init": None if init == "default" else init}
    return {
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modelspec.title": Path(config["output_dir"]).resolve().name,
        **{f"bilora.{key}": str(value) for key, value in facts.items() if value is not None},
    }


def file_metadata(
    parts: Mapping[str, Part], base_model: str, name: str, extra: Mapping[str, str]
) -> dict[str, str]:
    """The entries that both formats share; "modelspec" is Stability AI's ModelSpec 1.0.0.

    Entries of `extra` win, but for those that describe the tensors.
    """
    ranks = {component: part.file_rank for component, part in parts.items()}
    trained = {component: part.rank for component, part in parts.items()}
    alphas = {component: part.alpha for component, part in parts.items()}
    uniform = len(set(ranks.values())) == 1 and None not in ranks.values()
    base = Path(base_model).name if Path(base_model).is_dir() else base_model
    rank = str(next(iter(ranks.values()))) if uniform else "Dynamic"
    known = None not in trained.values()
    return {
        # The module of kohya's that reads such names of layers; it reads none of transformers.
        **({} if "transformer" in parts else {"ss_network_module": "networks.lora"}),
        **(_SDXL if _is_for_sdxl(parts) else {}),
        **({"ss_sd_model_name": base} if base else {}),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        **({"bilora.original_alpha": json.dumps(alphas)} if known else {}),
        **({"bilora.original_rank": json.dumps(trained)} if known and trained != ranks else {}),
        **extra,
        "format": "pt",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }


def _is_for_sdxl(parts: Mapping[str, Part]) -> bool:
    """Test that all layers that show a width have SDXL's; False where none does."""
    widths = {
        layer.A.shape[1] == _SDXL_READS[component][1]
        for component, part in parts.items()
        for layer in part.layers
        if component in _SDXL_READS and layer.name.endswith(_SDXL_READS[component][0])
    }
    return widths == {True}


def adapter_metadata(parts: Mapping[str, Part]) -> str:
    """PEFT's configuration of each primary as JSON, with keys prefixed by the model, for diffusers.

    What is not given has PEFT's default, such as no dropout. Alpha is the rank, as B has the scale.
    """
    entries: dict[str, Any] = {}
    for component, part in parts.items():
        rank = {"r": part.file_rank, "lora_alpha": part.file_rank, "use_dora": part.use_dora}
        fields = {"peft_type": "LORA", **rank, "target_modules": [x.name for x in part.layers]}
        entries |= {f"{component}.{key}": value for key, value in fields.items()}
    return json.dumps(entries, indent=2, sort_keys=True)


def model_hash(tensors: dict[str, Tensor]) -> str:
    """sshs_model_hash as kohya's scripts define it: SHA-256 of all that follows the file's header.

    So it depends on the tensors, in the order that safetensors gives them, not on the metadata.
    """
    content = safetensors.torch.save(tensors)
    header = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[header:]).hexdigest()


def save_models(folder: str | Path, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Write each model to `folder/name` and compare what the files hold with the model.

    A model appears whole or not at all, and replaces an older one.

    Args:
        folder: the run folder.
        models: diffusers or Transformers models by their names in the pipeline.

    Returns:
        For each model the number of its weights and the largest difference on reading back, 0.0.

    Raises:
        TrainingError: a weight is not finite, or the files hold something else.
    """
    report = {}
    for name, model in models.items():
        final, aside = Path(folder) / name, Path(folder) / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        cast(Any, model).save_pretrained(aside, safe_serialization=True)
        readable_as(aside / "config.json", *aside.glob("*.safetensors"))
        stored = {k: v for file in aside.glob("*.safetensors") for k, v in load_file(file).items()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Transformers leaves out what is tied to another weight.
        written = {id(value) for key, value in parameters.items() if key in stored}
        expected = {k: v for k, v in parameters.items() if k in stored or id(v) not in written}
        require_equal(final, {k: v for k, v in stored.items() if k in parameters}, expected)
        weights = sum(p.numel() for p in model.parameters())
        report[name] = {"weights": weights, "readback_difference": 0.0}
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    return report
