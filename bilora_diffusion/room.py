"""Room on the disk: whether it ran out, how much there is, and what a run will need."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

LINE = 400  # bytes of a line of metrics
PNG = 1.5  # bytes of a pixel
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_WORDS = os.strerror(errno.ENOSPC)
logger = logging.getLogger(__name__)


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
    want = f"about {size(missing)} more" if missing else "room"
    how = "give the same command again" if needed is None else "--resume_from_checkpoint latest"
    return f"the disk that holds {place} is full{there}: make {want} and go on with {how}"


def needs(trainer: Any) -> int:
    """Bytes that a run still writes, roughly: checkpoints, exported file, images, snapshots.

    Args:
        trainer: a `trainer.Trainer`, at its present step.
    """
    cfg, method = trainer.cfg, trainer.method
    ahead = trainer.num_steps - trainer.step
    trained = sum(t.numel() * t.element_size() for t in method.tensors().values())
    moments = 0.5 if cfg.use_8bit_adam else 4 if cfg.optimizer == "prodigy" else 2
    saved = ahead // cfg.checkpointing_steps
    if cfg.checkpoints_total_limit:  # one more is written before the oldest goes
        saved = min(saved, cfg.checkpoints_total_limit + 1)
    snapshots = 0 if trainer.dynamics is None else ahead // trainer.dynamics.every
    tensors = (saved * (1 + moments) + snapshots + 1) * trained
    images = len(cfg.sampled_prompts) * _validations(trainer, ahead)
    pixels = images * (cfg.resolution**2 if images else 0)
    return int(tensors + pixels * PNG + ahead * LINE)


def _validations(trainer: Any, ahead: int) -> int:
    """How often the steps ahead are validated; always at the end."""
    epochs = trainer.cfg.validation_epochs
    if not epochs:
        return 1
    steps = epochs * -(-trainer.task.num_samples // trainer.schedule.step_size)
    return max(ahead // steps, 1)


def warn(trainer: Any, folder: Path) -> None:
    """Say so where a run will plainly not fit on the disk."""
    left, needed = free(folder), needs(trainer)
    if left is not None and left < needed:
        logger.warning(
            "the disk that holds %s has %s left, and this run writes about %s: make room, or save"
            " less with --checkpoints_total_limit 1",
            *(folder, size(left), size(needed)),
        )
