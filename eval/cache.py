"""Cache of measurements beside the result, so that the same command goes on from there; and hashes
of the weights and files that they depend on, whatever these are called.

cache = Cache(folder, {"digest": subject.digest, "images": fingerprint})
value = cache.item(["sharpness", 0.05], measure)       # measured once
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bilora_diffusion.core.durable import strict_json, write_text
from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.core.lora_names import ADAPTER_METADATA
from bilora_diffusion.core.lora_names import CONFIG as PEFT_CONFIG
from bilora_diffusion.core.lora_names import WEIGHTS as PEFT_FILE
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.peft_config import read_config

FOLDER = "kept"
_ACTING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Names of PEFT's options that change how the tensors act."""


class Cache:
    """Values by key, each on the disk before the next one is made.

    One file of JSON lines in ``FOLDER`` for all that depends on the same: two commands that measure
    different subjects into one folder do not meet. What a kill tore off, or is damaged, is measured
    again.

    Args:
        folder: of the result.
        about: all that the values depend on beside their keys, as JSON can hold it: weights, base
            model, data, settings.
    """

    def __init__(self, folder: Path, about: Any) -> None:
        self._path = folder / FOLDER / f"{_key_digest(about)}.jsonl"
        self._values: dict[str, Any] = {}
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        # A whole line ends with a newline, so what follows the last one is torn off, or empty.
        whole_lines = [line for line in lines[:-1] if self._read(line)]
        if [*whole_lines, b""] != lines:
            text = b"".join(line + b"\n" for line in whole_lines)
            write_text(self._path, text.decode("utf-8"))

    def __contains__(self, key: Any) -> bool:
        return _key_digest(key) in self._values

    def get(self, key: Any) -> Any:
        """Value that :meth:`put` was given; None if nothing."""
        return self._values.get(_key_digest(key))

    def put(self, key: Any, value: Any) -> Any:
        """Keep a value that JSON can hold; returns it as it will be read back.

        A number that is not finite becomes None.
        """
        plain = strict_json({"key": key, "value": value})[0]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._values[_key_digest(key)] = plain["value"]
        return plain["value"]

    def item(self, key: Any, make: Callable[[], Any]) -> Any:
        """Value that is cached under a key, or that ``make`` returns now."""
        return self.get(key) if key in self else self.put(key, make())

    def _read(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            self._values[_key_digest(entry["key"])] = entry["value"]
        except (ValueError, KeyError, TypeError):
            return False
        return True


def _key_digest(value: Any) -> str:
    text = json.dumps(strict_json(value)[0], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
