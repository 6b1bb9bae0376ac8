"""Files that survive a crash: written aside, flushed, then renamed into place.

`replacing` is the one way to write a file whole; `write_text` and `write_bytes` are it for what is
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

TEMPORARY = ".tmp-"  # prefix of everything that is not finished, or is being deleted


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Replace the file ``path``: readers and crashes see the old content or the new.

    Yields:
        Where to write the new content: beside ``path``, under its name and ``ending``, for loaders
        that look for files by theirs. If that fails, ``path`` stays as it is.
    """
    aside = path.with_name(TEMPORARY + path.name + ending)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # half of it would only take room on a full disk
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) as ``path``, by `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` as ``path``, by `replacing`."""
    with replacing(path) as aside:
        aside.write_bytes(data)


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
    """Turn plain Python values into what strict JSON can say, and tell whether a number in them was
    not finite, which becomes ``None``.

    Tuples become lists, ``os.PathLike`` strings, 0-d tensors and NumPy scalars numbers. Raises
    TypeError for anything else.
    """
    constants: list[str] = []  # NaN and infinities
    text = json.dumps(value, default=_plain)
    return json.loads(text, parse_constant=constants.append), bool(constants)  # `append` gives None


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dump_json(value: Any) -> str:
    """Readable strict JSON, ending with a newline."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=True) + "\n"


def disk_is_full(error: BaseException) -> bool:
    """Test that an exception, or one that it came from, says that a disk or a quota is full."""
    cause: BaseException | None = error
    for _ in range(100):  # causes may run in a circle
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors says it in words only
        if type(cause).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
