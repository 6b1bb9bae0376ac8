"""Files that survive a crash: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # prefix of everything that is not finished, or is being deleted


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8): readers and crashes see the old content or the new."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: readers and crashes see the old content or the new."""
    aside = path.with_name(TEMPORARY + path.name)
    try:
        aside.write_bytes(data)
        sync(aside)
    except OSError:
        aside.unlink(missing_ok=True)  # half of it would only take room on a full disk
        raise
    os.replace(aside, path)
    sync(path.parent)


def overwrite_text(path: Path, text: str) -> None:
    """Write ``text`` over what ``path`` holds, where a full disk has no room for a second file.

    Raises:
        OSError: the disk has no room for this either; the file is as it was.
    """
    before = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        try:
            _write_all(file, text.encode("utf-8"))
        except OSError:
            file.seek(0)
            _write_all(file, before)
            raise
        os.fsync(file.fileno())


def _write_all(file: Any, data: bytes) -> None:
    size = len(data)
    while data:
        data = data[file.write(data) :]
    file.truncate(size)


def readable_as(pattern: Path, *paths: Path) -> None:
    """Give files the permissions of one that was written by ``open``.

    safetensors 0.8 makes its files readable by their owner alone, whatever the umask
    (https://github.com/safetensors/safetensors/issues/782), and an adapter is made to be shared.
    """
    for path in paths:
        shutil.copymode(pattern, path)


def discard(path: Path) -> None:
    """Delete a file or a folder so that a crash never leaves half of it under its own name."""
    doomed = path
    if not path.name.startswith(TEMPORARY):
        doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")
        if doomed.is_dir():
            shutil.rmtree(doomed)
        os.replace(path, doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writes and deletions left in ``folder``."""
    for leftover in folder.glob(TEMPORARY + "*"):
        discard(leftover)


def strict_json(value: Any) -> tuple[Any, bool]:
    """Turn plain Python values into what strict JSON can say.

    Tuples become lists, ``os.PathLike`` strings, 0-d tensors and NumPy scalars numbers, and NaN
    and infinities ``None``.

    Returns:
        The value, and whether a number in it was not finite.

    Raises:
        TypeError: for anything else.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) is not None and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value, False
    if isinstance(value, float):
        finite = math.isfinite(value)
        return (float(value) if finite else None), not finite
    if isinstance(value, os.PathLike):
        return os.fspath(value), False
    if isinstance(value, Mapping):
        items = {str(key): strict_json(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, any(
            odd for _, odd in items.values()
        )
    if isinstance(value, list | tuple):
        parts = [strict_json(item) for item in value]
        return [item for item, _ in parts], any(odd for _, odd in parts)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dump_json(value: Any) -> str:
    """Readable strict JSON, ending with a newline."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=True) + "\n"
