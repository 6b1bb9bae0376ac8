"""Crash-safe file writes: write to a temporary file, flush it, then rename it.

`replacing` does this for a single file. `write_text` and `write_bytes` call it for content that is
in memory.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Prefix of the names of files and folders that are being written or deleted.
TEMPORARY = ".tmp-"


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Replace the file ``path`` atomically: even after a crash, it has the old or the new content.

    Args:
        path: the file, which need not exist.
        ending: suffix of the temporary file's name, for example to make the name unique.

    Yields:
        Path of the temporary file next to ``path``, which the caller writes. If writing fails,
        ``path`` is unchanged.
    """
    temporary = path.with_name(TEMPORARY + path.name + ending)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        # After a failure the disk may be full, so a partial file is not kept.
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path`` in UTF-8, atomically (`replacing`)."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to the file ``path``, atomically (`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def readable_as(pattern: Path, *paths: Path) -> None:
    """Copy the permissions of ``pattern``, a file that Python wrote, to ``paths``.

    safetensors 0.8 ignores the umask and makes its files readable by their owner only
    (https://github.com/safetensors/safetensors/issues/782), but adapters are meant to be shared.
    """
    for path in paths:
        shutil.copymode(pattern, path)


def discard(path: Path) -> None:
    """Delete a file or a folder; rename it first, so a crash leaves no part under its name."""
    temporary = path
    if not path.name.startswith(TEMPORARY):
        temporary = path.with_name(f"{TEMPORARY}deleted-{path.name}")
        # Left by an interrupted deletion. A folder can't be renamed to an existing folder's name.
        if temporary.is_dir():
            shutil.rmtree(temporary)
        os.replace(path, temporary)
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that interrupted commands left in ``folder``."""
    for leftover in folder.glob(TEMPORARY + "*"):
        discard(leftover)


def strict_json(value: Any) -> tuple[Any, bool]:
    """Convert plain Python values to values that strict JSON can represent.

    Tuples become lists, ``os.PathLike`` objects become strings, 0-d tensors and NumPy scalars
    become numbers, and numbers that are not finite become None.

    Returns:
        The converted value, and whether it contained a number that is not finite.

    Raises:
        TypeError: JSON can't represent a value.
    """
    # `json.dumps` writes NaN and infinities as words, and `json.loads` calls `parse_constant` for
    # each of them. `append` returns None, which replaces the word.
    constants: list[str] = []
    text = json.dumps(value, default=_to_plain)
    strict_value = json.loads(text, parse_constant=constants.append)
    return strict_value, bool(constants)


def _to_plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dump_json(value: Any) -> str:
    """Return indented strict JSON that ends with a newline."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=True) + "\n"


def disk_is_full(error: BaseException) -> bool:
    """Return whether an exception or one of its causes reports a full disk or a used-up quota."""
    cause: BaseException | None = error
    for _ in range(100):  # causes may form a cycle
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors gives no error number, only the system's message.
        if type(cause).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
