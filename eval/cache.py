"""Cache of measurements, and hashes of the weights and files that the measurements depend on.

The cache is stored next to the result, so the same command resumes after an interruption.

    cache = Cache(folder, {"digest": subject.digest, "images": fingerprint})
    value = cache.item(["sharpness", 0.05], measure)       # calls `measure` only the first time
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

# Folder of the cache files, in the result's folder
FOLDER = "kept"
# PEFT options that change the effect of the tensors
ACTING_OPTIONS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


class Cache:
    """Values by key; each value is on the disk before the next one is computed.

    Measurements with the same circumstances share one file of JSON lines in ``FOLDER``, so commands
    that measure different subjects into one folder do not mix their values. If a line is damaged,
    or incomplete because the process was killed, its value is measured again.

    Args:
        folder: folder of the result.
        circumstances: everything that the values depend on except their keys, such as weights, base
            model, data and settings; JSON-serializable.
    """

    def __init__(self, folder: Path, circumstances: Any) -> None:
        self._path = folder / FOLDER / f"{_hash_of(circumstances)}.jsonl"
        self._values: dict[str, Any] = {}
        content = self._path.read_bytes() if self._path.exists() else b""
        # A complete line ends with a newline: text after the last newline is an incomplete line.
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
        """Return the value stored under a key; None if the cache does not have the key."""
        return self._values.get(_hash_of(key))

    def put(self, key: Any, value: Any) -> Any:
        """Store a JSON-serializable value, and return it as it will be read back.

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
        """Return the value cached under a key; if the key is new, cache the result of ``make``."""
        if key in self:
            return self.get(key)
        return self.put(key, make())

    def _add(self, line: bytes) -> bool:
        """Read a line of the file; return whether the line is undamaged."""
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
    """Return a hash of a LoRA file's tensors and of the options that change their effect."""
    options = json.loads(inspect(path).metadata.get(ADAPTER_METADATA, "{}"))
    acting = {}
    for name, value in options.items():  # such as "unet.lora_alpha"
        if name.rpartition(".")[2] in ACTING_OPTIONS:
            acting[name] = value
    return _hash_of_tensors([("", path)], acting)


def hash_of_peft(folder: Path) -> str:
    """Return the hash of the PEFT adapter in a folder; see :func:`hash_of_lora`."""
    options = peft_config(folder)
    acting = {name: options[name] for name in options if name in ACTING_OPTIONS}
    return _hash_of_tensors([("", folder / PEFT_FILE)], acting)


def hash_of_models(folder: Path, names: Sequence[str]) -> str:
    """Return a hash of the whole models in a folder.

    Args:
        folder: folder that contains the models.
        names: names of the models, which are subfolders.
    """
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
    """Return a hash of each tensor's name, dtype, shape and bytes, and of the options.

    Other metadata, such as dates and titles, is not hashed.

    Args:
        files: pairs of a prefix, which is added to the tensors' names, and a file.
        acting: options that change the effect of the tensors; None for whole models.
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
                # Viewed as bytes, because NumPy has no bfloat16.
                state.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def hash_of_folders(*folders: Path, suffixes: Sequence[str] = ()) -> str:
    """Return a hash of the names and contents of the files in some folders.

    Args:
        folders: folders, searched recursively.
        suffixes: suffixes of the files that are hashed; () for all files.
    """
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
    """Return the first 12 hex digits of a file's SHA-256 hash.

    For several files, they come from the SHA-256 hash of the files' hashes.
    """
    hashes = [hash_of_file(path) for path in files]
    # The hash of a single file can be checked with sha256sum.
    if len(hashes) == 1:
        return hashes[0][:12]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


def peft_config(folder: Path) -> dict[str, Any]:
    """Return the content of the ``adapter_config.json`` of a PEFT adapter's folder."""
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a PEFT adapter: it has no {PEFT_CONFIG}; give another.")
    return read_config(path)
