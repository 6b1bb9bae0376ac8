"""Hashes that identify weights and files, whatever they are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.core.lora_names import ADAPTER_METADATA
from bilora_diffusion.core.lora_names import CONFIG as PEFT_CONFIG
from bilora_diffusion.core.lora_names import WEIGHTS as PEFT_FILE
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.peft_config import read_config

_ACTING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Names of PEFT's options that change how the tensors act."""


def of_lora(path: Path) -> str:
    """Hash of a LoRA file, and of its metadata that change how the tensors act."""
    described = json.loads(inspect(path).metadata.get(ADAPTER_METADATA, "{}"))
    acting = {k: v for k, v in described.items() if k.rpartition(".")[2] in _ACTING}
    return _digest([("", path)], acting)


def of_peft(folder: Path) -> str:
    """Hash of a folder with a PEFT adapter; see :func:`of_lora`."""
    acting = {k: v for k, v in peft_config(folder).items() if k in _ACTING}
    return _digest([("", folder / PEFT_FILE)], acting)


def of_models(folder: Path, names: Sequence[str]) -> str:
    """Hash of whole models in a folder."""
    files = []
    for name in names:
        parts = sorted((folder / name).glob("*.safetensors"))
        if not parts:
            raise UserError(f"{folder / name} has no .safetensors file: train again.")
        files += [(name, part) for part in parts]
    return _digest(files)


def _digest(files: Sequence[tuple[str, Path]], acting: Mapping[str, Any] | None = None) -> str:
    """Hash of name, dtype, shape and bytes of each tensor; other metadata plays no part."""
    import torch

    state = hashlib.sha256()
    if acting is not None:
        state.update(json.dumps(acting, sort_keys=True).encode())
    for prefix, path in files:
        with (
            translated(f"{path} is not a whole safetensors file", "write or download it again"),
            safe_open(path, framework="pt") as content,
        ):
            for key in sorted(content.keys()):
                tensor = content.get_tensor(key).contiguous()
                shape = tuple(tensor.shape)
                state.update(f"{prefix}/{key} {tensor.dtype} {shape}\n".encode())
                state.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def of_folders(*folders: Path, suffixes: Sequence[str] = ()) -> str:
    """Hash of names and bytes of all files in folders, or of those with one of the suffixes."""
    state = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and (not suffixes or path.suffix in suffixes):
                name = path.relative_to(folder).as_posix()
                state.update(f"{name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    hashlib.file_digest(file, lambda: state)  # goes on with it
    return state.hexdigest()


def of_files(*files: Path) -> str:
    """First 12 hex digits of the SHA-256 of a file, or of the hashes of several."""
    sums = []
    for path in files:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(sums) == 1:
        return sums[0][:12]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:12]


def peft_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder with a PEFT adapter."""
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a PEFT adapter (it has no {PEFT_CONFIG}): give another.")
    return read_config(path)
