"""Files that survive a crash: written under a temporary name, flushed, then renamed.

Every file that is written whole is written by `replacing`, or by `write_text` and `write_bytes`,
which call it for content in memory.
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

# Prefix of the name of what is not finished, or is being deleted.
TEMPORARY = ".tmp-"


def sync(path: Path) -> None:
    """Flush a file, or the list of a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Replace the file ``path``; readers, also after a crash, see the old content or the new.

    Args:
        path: the file, which need not exist.
        ending: added to the temporary name, for writers that use the ending of a name.

    Yields:
        The temporary file next to ``path`` to write into. If writing fails, ``path`` is unchanged.
    """
    temporary = path.with_name(TEMPORARY + path.name + ending)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        # After a failure half a file would take room on a disk that may be full.
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in UTF-8 (`replacing`)."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file ``path`` by ``data`` (`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def readable_as(pattern: Path, *paths: Path) -> None:
    """Give files the permissions of ``pattern``, a file that Python wrote.

    safetensors 0.8 makes its files readable by their owner alone, whatever the umask
    (https://github.com/safetensors/safetensors/issues/782), and an adapter is made to be shared.
    """
    for path in paths:
        shutil.copymode(pattern, path)


def discard(path: Path) -> None:
    """Delete a file or a folder; after a crash no part of it has its name."""
    temporary = path
    if not path.name.startswith(TEMPORARY):
        temporary = path.with_name(f"{TEMPORARY}deleted-{path.name}")
        # Of an earlier deletion that was interrupted. A folder can't be renamed onto another one.
        if temporary.is_dir():
            shutil.rmtree(temporary)
        os.replace(path, temporary)
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of interrupted writers and deletions from ``folder``."""
    for leftover in folder.glob(TEMPORARY + "*"):
        discard(leftover)


def strict_json(value: Any) -> tuple[Any, bool]:
    """Convert plain Python values to what strict JSON can say.

    Tuples become lists, ``os.PathLike`` strings, 0-d tensors and NumPy scalars numbers, and numbers
    that are not finite None.

    Returns:
        The value, and whether a number in it was not finite.

    Raises:
        TypeError: JSON can't hold a value.
    """
    # Python's JSON writes NaN and infinities as words, and reads each word by `parse_constant`.
    # `append` returns None, which takes the word's place.
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
    """Indented strict JSON that ends in a newline."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=True) + "\n"


def disk_is_full(error: BaseException) -> bool:
    """Test that an exception, or one of its causes, says that a disk or a quota is full."""
    cause: BaseException | None = error
    for _ in range(100):  # causes may run in a circle
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors has no error number, only the system's words.
        if type(cause).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
