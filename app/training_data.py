"""State of a run, by its record and the metrics that it has written. No widgets here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bilora_diffusion.run.durations import duration
from bilora_diffusion.run.lock import STALE_SECONDS

BUSY_SECONDS = 3600.0
"""``STALE_SECONDS`` of a run that said that it does something else than steps, such as images."""
TRAINING = "training"
RECENT_STEPS = 50
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """State of a run.

    Args:
        status: "running", "finished", "interrupted", "failed" or "stalled"; of a running one that
            is busy with something else than steps, its name, such as "validation images".
        reason: of a failed or a stalled run, in one sentence; "" otherwise.
        steps, total: steps done and to do; ``total`` None where it is not known.
        wall_seconds: spent so far, over all resumes.
        left_seconds: of a running run, by its recent steps; None where it can't be told.
        peak_memory_bytes: of the accelerator, or of the process on a CPU.
    """

    status: str
    reason: str
    steps: int
    total: int | None
    wall_seconds: float
    left_seconds: float | None
    peak_memory_bytes: int


def progress(
    record: Row, rows: Sequence[Row], last_written: float, now: float | None = None
) -> Progress:
    """The state of a run.

    Args:
        record: ``run.json``.
        rows: of ``metrics.jsonl``.
        last_written: time of the last change of either file, in seconds as ``time.time`` counts.
        now: by default ``time.time()``.
    """
    now = time.time() if now is None else now
    silent = max(0.0, now - last_written)
    taken = [row for row in rows if row.get("seconds") is not None]
    recent = [row["seconds"] for row in taken[-RECENT_STEPS:]]
    usual = statistics.median(recent) if recent else 0.0
    steps = max((row["step"] for row in rows), default=0)
    total = record.get("num_steps") or record["config"].get("max_train_steps")
    status, reason = record["status"], record.get("error") or ""
    doing = record.get("doing") or TRAINING
    patience = STALE_SECONDS if doing == TRAINING else BUSY_SECONDS
    running = status == "running"
    if running and silent > max(patience, 10 * usual):
        running, status = False, "stalled"
        reason = f"it has written nothing for {duration(silent)}: it was probably killed"
    elif running and doing != TRAINING:
        status, since = doing, _seconds(record.get("doing_since"))
        reason = f"since {duration(max(0.0, now - since))}" if since is not None else ""
    left = None
    if running and total is not None and recent:
        left = max(0, total - steps) * usual
    wall, peak = record.get("wall_seconds", 0.0), record.get("peak_memory_bytes", 0)
    return Progress(status, reason, steps, total, wall, left, peak)


def _seconds(moment: Any) -> float | None:
    """A time of the record as ``time.time`` counts; None where it is none."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None
