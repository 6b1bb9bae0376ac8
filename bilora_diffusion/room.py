"""Room on the disk: whether it ran out, how much there is, and what a run will need."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def is_full(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that a disk or a quota is full."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # safetensors says it in words only
        words = type(current).__name__ == "SafetensorError" and _WORDS in str(current)
        if words or (isinstance(current, OSError) and current.errno in FULL):
            return True
        current = current.__cause__ or current.__context__
    return False


_WORDS = os.strerror(errno.ENOSPC)


def free(path: Path) -> int | None:
    """Free bytes where ``path`` is or would be made; None where the system does not say."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def size(count: float) -> str:
    """Bytes for people, such as "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def sentence(error: BaseException, folder: Path | None = None, needed: int | None = None) -> str:
    """That the disk is full, where, and how much is missing.

    Args:
        error: what `is_full` told.
        folder: where was being written; by default what the exception names.
        needed: bytes that are still to be written, where they are known.
    """
    named = getattr(error, "filename", None)
    place = folder or (Path(os.fsdecode(named)) if named else None)
    if place is None:
        return "the disk is full: make room and give the same command again"
    left = free(place)
    there = "" if left is None else f" ({size(left)} are left)"
    missing = None if needed is None or left is None else max(needed - left, 0)
    want = f"about {size(missing)}" if missing else "room"
    return f"the disk that holds {place} is full{there}: make {want} and go on"
