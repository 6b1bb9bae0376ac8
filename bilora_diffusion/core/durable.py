"""Files that survive a crash: written aside, flushed, then renamed into place; and full disks.

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
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
FULL_IN_WORDS = os.strerror(errno.ENOSPC)


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


def overwrite_text(path: Path, text: str) -> None:
    """Write ``text`` into the room that ``path`` has, where a full disk has none for a second file;
    raises OSError if it is longer.
    """
    data = text.encode("utf-8")
    with open(path, "r+b", buffering=0) as file:
        if len(data) > os.fstat(file.fileno()).st_size:
            raise OSError(errno.ENOSPC, FULL_IN_WORDS, str(path))
        file.write(data)
        file.truncate()
        os.fsync(file.fileno())


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
    odd: list[str] = []
    text = json.dumps(value, default=_plain)
    return json.loads(text, parse_constant=odd.append), bool(odd)  # `append` gives None


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
    current: BaseException | None = error
    for _ in range(100):  # causes may run in a circle
        if current is None:
            break
        # safetensors says it in words only
        if type(current).__name__ == "SafetensorError" and FULL_IN_WORDS in str(current):
            return True
        if isinstance(current, OSError) and current.errno in FULL:
            return True
        current = current.__cause__ or current.__context__
    return False


def free_bytes(path: Path) -> int | None:
    """Free bytes where ``path`` is or would be made; None where the system does not say."""
    path = Path(path).absolute()
    try:
        place = next(place for place in (path, *path.parents) if place.exists())
        return shutil.disk_usage(place).free
    except OSError:
        return None


def bytes_for_people(count: float) -> str:
    """Bytes for people, such as "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def full_disk_sentence(
    error: BaseException, folder: Path | None = None, needed: int | None = None
) -> str:
    """Say that the disk is full, where (by default where the exception says), and how much of the
    bytes that are ``needed`` is missing.
    """
    named = getattr(error, "filename", None)
    place = folder or (Path(os.fsdecode(named)) if named else None)
    if place is None:
        return "the disk is full: make room and give the same command again"
    left = free_bytes(place)
    there = "" if left is None else f" ({bytes_for_people(left)} are left)"
    missing = None if needed is None or left is None else max(needed - left, 0)
    want = f"about {bytes_for_people(missing)} more" if missing else "room"
    how = "give the same command again" if needed is None else "--resume_from_checkpoint latest"
    return f"the disk that holds {place} is full{there}: make {want} and go on with {how}"
