"""The file of a trainer's checkpoint beside the primary: `bilora_state.safetensors`, with both
adapters as they are trained and, as metadata, the settings that they belong to.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import adapters
from ..adapters import INITIAL, PRIMARY
from ..api import BiLoRA
from ..core.durable import readable_as, replacing
from ..core.errors import UserError, reading, translated
from ..core.lora_names import CONFIG, WEIGHTS
from ..run.checkpoint import load_tensors, require_same_settings, separate

STATE = "bilora_state.safetensors"
TRAINER_FILES = ("optimizer.pt", "scheduler.pt")
"""The trainer's own files without which it would go on with a fresh optimizer and not say so."""

_VERSION = 2


def write(folder: Path, bilora: BiLoRA) -> None:
    """Write the adapters and the method's state into a checkpoint that holds the primary."""
    settings = {
        "schema_version": _VERSION,
        "config": asdict(bilora.config),
        "method": bilora._method.state_dict(),
    }
    metadata = {"format": "pt", "bilora": json.dumps(settings)}
    with replacing(folder / STATE) as aside:
        save_file(separate(bilora._method.tensors()), aside, metadata=metadata)
        readable_as(folder / CONFIG, aside)


def restore(folder: Path, bilora: BiLoRA) -> None:
    """Put a checkpoint's adapters and method state back, if it is whole and of these settings."""
    for name in (STATE, *TRAINER_FILES):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, so training can't go on from it exactly; resume from a "
                "checkpoint that was written with use_bilora and save_only_model=False."
            )
    settings, tensors = _read(folder / STATE)
    require_same_settings(settings["config"], json.loads(json.dumps(asdict(bilora.config))))
    current = bilora._method.tensors()
    for name, value in current.items():
        if f"/{INITIAL}/" in name and not torch.equal(value.cpu(), tensors.get(name, value[:0])):
            raise UserError(
                f'init "{bilora.config.init}" has started the primary elsewhere than in {folder}, '
                "so the base weights differ; start it from the same model (and samples)."
            )
    load_tensors(current, tensors)
    bilora._method.load_state_dict(settings["method"])


def load_primary(folder: Path, bilora: BiLoRA) -> None:
    """Put the primary of a folder back, which `bilora.save_pretrained` wrote, if it fits."""
    path = folder / WEIGHTS
    saved = reading(str(path), "keep it in place", lambda: load_file(path))
    parameters = adapters.named_parameters(bilora.model, PRIMARY)
    primary = {adapters.peft_key(key): value for key, value in parameters.items()}
    heads = adapters.head_parameters(bilora.model, PRIMARY)
    if missing := sorted({adapters.peft_path(key) for key in (*primary, *heads)} - saved.keys()):
        raise UserError(f"{missing[0]} is missing in {path}; it is of another model.")
    # of an init that changed the base weights the file has [B, -B0] and [A; A0]: the first part
    parts = {
        key: saved[adapters.peft_path(key)][tuple(slice(size) for size in value.shape)]
        for key, value in primary.items()
    }
    load_tensors(primary, parts)
    load_tensors(heads, {key: saved[adapters.peft_path(key)] for key in heads})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with translated(f"{path} is truncated or altered", "resume from another checkpoint"):
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["bilora"])
        if settings["schema_version"] != _VERSION:
            raise UserError(
                f"{path} has schema version {settings['schema_version']!r}, but this version of "
                f"bilora_diffusion reads {_VERSION}; resume with the version that wrote it."
            )
        return settings, load_file(path)
