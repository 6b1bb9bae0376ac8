"""Hashes of models on disk or in memory: every bit of their weights, and their settings.

Not names and dates, which stay when a file is replaced. xxHash reads some gigabytes a second.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

_SHA256 = re.compile("[0-9a-f]{64}")


def of_files(folders: Iterable[Path]) -> str:
    """Identifies what the files of folders hold and what they are called; 32 hexadecimal digits.

    A file in the hub's cache is known by its blob, which is named by its content already.
    """
    state = xxhash.xxh3_128()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            state.update(f"{folder.name}/{file.relative_to(folder)}:{_of_file(file)}\n".encode())
    return state.hexdigest()


def of_model(model: nn.Module) -> str:
    """Identifies a loaded model of diffusers by its class, settings and all its weights, wherever
    it was read from; 32 hexadecimal digits.
    """
    config: Any = model.config
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    named = json.dumps([type(model).__name__, settings], default=str, sort_keys=True)
    state = xxhash.xxh3_128(named.encode())
    state.update(of_tensors(dict(model.state_dict())).encode())
    return state.hexdigest()


def of_tensors(tensors: dict[str, Tensor]) -> str:
    """Identifies tensors by name, dtype, shape and every bit; 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        state.update(f"{name} {flat.dtype} {tuple(tensors[name].shape)}\n".encode())
        if flat.numel():
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def _of_file(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
