"""Cache of measurements beside the result, so that the same command goes on where it stopped; and
hashes of the weights and files that the measurements depend on, whatever their names.

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
from bilora_diffusion.core.errors import UserError, as_user_error
from bilora_diffusion.core.files import hash_of_file
from bilora_diffusion.core.lora_names import ADAPTER_METADATA
from bilora_diffusion.core.lora_names import CONFIG as PEFT_CONFIG
from bilora_diffusion.core.lora_names import WEIGHTS as PEFT_FILE
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.peft_config import read_config

# Beside the files of the result
FOLDER = "kept"
# PEFT's options that change how the tensors act
ACTING_OPTIONS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


class Cache:
    """Values by key, each on the disk before the next one is made.

    Measurements that depend on the same circumstances share one file of JSON lines in ``FOLDER``,
    so commands that measure different subjects into one folder do not mix their values. A line
    that is damaged, or torn off by a kill, is measured again.

    Args:
        folder: of the result.
        circumstances: all that the values depend on, except their keys, as JSON can hold it:
            weights, base model, data, settings.
    """

    def __init__(self, folder: Path, circumstances: Any) -> None:
        self._path = folder / FOLDER / f"{_hash_of(circumstances)}.jsonl"
        self._values: dict[str, Any] = {}
        content = self._path.read_bytes() if self._path.exists() else b""
        # A whole line ends with a newline: the text after the last newline was torn off by a kill.
        valid_lines = []
        for line in content.split(b"\n")[:-1]:
            if self._add(line):
                valid_lines.append(line + b"\n")
        valid_content = b"".join(valid_lines)
        if valid_content != content:
            write_text(self._path, valid_content.decode("utf-8"))

    def __contains__(self, key: Any) -> bool:
        return _hash_of(key) in self._values

    def get(self, key: Any) -> Any:
        """Value that :meth:`put` was given; None without one."""
        return self._values.get(_hash_of(key))

    def put(self, key: Any, value: Any) -> Any:
        """Store a value that JSON can hold; returns it as it will be read back.

        A number that is not finite becomes None.
        """
        entry = strict_json({"key": key, "value": value})[0]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._values[_hash_of(key)] = entry["value"]
        return entry["value"]

    def item(self, key: Any, make: Callable[[], Any]) -> Any:
        """Value that is cached under a key, or that ``make`` returns now."""
        if key in self:
            return self.get(key)
        return self.put(key, make())

    def _add(self, line: bytes) -> bool:
        """Read a line of the file; False if it is damaged."""
        try:
            entry = json.loads(line)
            self._values[_hash_of(entry["key"])] = entry["value"]
        except (ValueError, KeyError, TypeError):
            return False
        return True


def _hash_of(value: Any) -> str:
    text = json.dumps(strict_json(value)[0], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hash_of_lora(path: Path) -> str:
    """Hash of a LoRA file, and of the options in its metadata that change how the tensors act."""
    options = json.loads(inspect(path).metadata.get(ADAPTER_METADATA, "{}"))
    acting = {}
    for name, value in options.items():  # such as "unet.lora_alpha"
        if name.rpartition(".")[2] in ACTING_OPTIONS:
            acting[name] = value
    return _hash_of_tensors([("", path)], acting)


def hash_of_peft(folder: Path) -> str:
    """Hash of a folder with a PEFT adapter; see :func:`hash_of_lora`."""
    options = peft_config(folder)
    acting = {name: options[name] for name in options if name in ACTING_OPTIONS}
    return _hash_of_tensors([("", folder / PEFT_FILE)], acting)


def hash_of_models(folder: Path, names: Sequence[str]) -> str:
    """Hash of whole models in a folder."""
    files = []
    for name in names:
        parts = sorted((folder / name).glob("*.safetensors"))
        if not parts:
            raise UserError(f"{folder / name} has no .safetensors file: train again.")
        files += [(name, part) for part in parts]
    return _hash_of_tensors(files)


def _hash_of_tensors(
    files: Sequence[tuple[str, Path]], acting: Mapping[str, Any] | None = None
) -> str:
    """Hash of name, dtype, shape and bytes of each tensor, and of the options that act.

    The files' other metadata is left out: it has dates and titles.

    Args:
        files: (prefix of its tensors' names, file) each.
        acting: the options, or None where a file has none.
    """
    import torch

    state = hashlib.sha256()
    if acting is not None:
        state.update(json.dumps(acting, sort_keys=True).encode())
    for prefix, path in files:
        with (
            as_user_error(f"{path} is not a whole safetensors file", "write or download it again"),
            safe_open(path, framework="pt") as content,
        ):
            for key in sorted(content.keys()):
                tensor = content.get_tensor(key).contiguous()
                shape = tuple(tensor.shape)
                state.update(f"{prefix}/{key} {tensor.dtype} {shape}\n".encode())
                # As bytes, since NumPy has no bfloat16.
                state.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def hash_of_folders(*folders: Path, suffixes: Sequence[str] = ()) -> str:
    """Hash of names and bytes of all files in folders, or of those with one of the suffixes."""
    state = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and (not suffixes or path.suffix in suffixes):
                name = path.relative_to(folder).as_posix()
                state.update(f"{name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    hashlib.file_digest(file, lambda: state)  # updates the same state
    return state.hexdigest()


def hash_of_files(*files: Path) -> str:
    """First 12 hex digits of the SHA-256 of a file, or of the hashes of several."""
    hashes = [hash_of_file(path) for path in files]
    # One file has its own hash, which others can check with sha256sum.
    if len(hashes) == 1:
        return hashes[0][:12]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


def peft_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder with a PEFT adapter."""
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a PEFT adapter (it has no {PEFT_CONFIG}): give another.")
    return read_config(path)
