"""What training curves are drawn from: a run's metrics as they grow, and its state. No widgets.

rows = Reader().read(folder)              # read again only where the file has changed
smooth(series(rows, "loss"), window=25)
radius(record, last_step=120)             # rho over the steps
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bilora_diffusion.image.heldout import BY_LEVEL
from bilora_diffusion.methods.options import rising
from bilora_diffusion.run.durations import duration
from bilora_diffusion.run.lock import STALE_SECONDS
from bilora_diffusion.run.record import METRICS, read_metrics

Row = Mapping[str, Any]
Points = list[tuple[int, float]]
"""(step, value), by step."""

BUSY_SECONDS = 3600.0
"""``STALE_SECONDS`` of a run that said that it does something else than steps, such as images."""
TRAINING = "training"
LEVEL = re.compile(rf"{re.escape(BY_LEVEL)}(\d{{1,9}})")
RADIUS_POINTS = 101
RECENT_STEPS = 50


class Reader:
    """Reads ``metrics.jsonl`` of runs again and again, for all users at once."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[object, list[dict[str, Any]]]] = {}
        self._lock = threading.Lock()

    def read(self, folder: Path) -> list[dict[str, Any]]:
        """The lines so far, a torn last one left out; empty without the file.

        Raises:
            UserError: a line is no metrics line, or the file can't be read.
        """
        path = Path(folder) / METRICS
        with self._lock:
            status = path.stat() if path.exists() else None
            stamp = status and (status.st_ino, status.st_size, status.st_mtime_ns)
            kept = self._kept.get(path)
            if kept is None or kept[0] != stamp:
                kept = self._kept[path] = (stamp, read_metrics(folder))
            return kept[1]


def pairs(steps: Sequence[int], values: Sequence[float | None]) -> Points:
    """Values at their steps; those that were not finite are left out."""
    both = zip(steps, values, strict=True)
    return [(step, value) for step, value in both if value is not None]


def by_level(rows: Sequence[Row]) -> Points:
    """Held-out loss at each noise level: the last measurement minus the first."""
    measured = [row for row in rows if "heldout_loss" in row] or [{}]
    first, last = measured[0], measured[-1]
    levels = {key: int(level[1]) for key in last if (level := LEVEL.fullmatch(key))}
    both = [(level, last[key], first.get(key)) for key, level in levels.items()]
    return [(level, end - start) for level, end, start in both if None not in (end, start)]


def series(rows: Sequence[Row], key: str) -> Points:
    """A metric over the steps; rows without it, or with null for a non-finite number, left out."""
    found = []
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append((row["step"], float(value)))
    return found


def smooth(points: Points, window: int) -> Points:
    """The mean of each value and up to ``window - 1`` values before it."""
    values = pd.Series([value for _, value in points], dtype=float)
    means = values.rolling(max(1, window), min_periods=1).mean()
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def thin(points: Points, limit: int = 400) -> Points:
    """At most about ``limit`` points: the lowest and the highest of equal stretches of steps.

    The first and the last point stay, so a curve keeps its length and its peaks.
    """
    if len(points) <= limit:
        return points
    kept = {0, len(points) - 1}
    values = np.asarray([value for _, value in points])
    for stretch in np.array_split(np.arange(len(points)), limit // 2):
        kept.add(int(stretch[values[stretch].argmin()]))
        kept.add(int(stretch[values[stretch].argmax()]))
    return [points[at] for at in sorted(kept)]


def radius(record: Row, last_step: int) -> Points:
    """rho of the ball over steps 1 to ``last_step``, in the units in which the norm is logged.

    The logged norm is that of ``rho_norm`` (scaled by alpha/r or bare), and rho bounds just that,
    so the line needs no conversion. Empty for a method without a ball, and for a rho schedule whose
    length ``run.json`` does not tell.

    Args:
        record: ``run.json``.
    """
    config = record["config"]
    rho = config.get("rho")
    bare = config.get("ball") == "none"  # the ablation whose norm nothing bounds
    if record["method"] != "bilora" or not isinstance(rho, int | float) or bare or last_step < 1:
        return []
    schedule = config.get("rho_schedule", "constant")
    if schedule == "constant":
        return [(step, float(rho)) for step in sorted({1, last_step})]
    total = total_steps(record)
    if total is None:
        return []
    steps = sorted({round(at) for at in np.linspace(1, last_step, RADIUS_POINTS)})
    return [(step, rho * rising(schedule, min(1.0, step / total))) for step in steps]


def total_steps(record: Row) -> int | None:
    """How many steps the run is to take; None in an old record of a run that counts epochs."""
    return record.get("num_steps") or record["config"].get("max_train_steps")


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        status: "running", "finished", "interrupted", "failed" or "stalled"; of a running one that
            is busy with something else than steps, what that is, such as "validation images".
        reason: why it failed, in one sentence, or what a stalled run means; "" otherwise.
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
    """Where a run stands.

    Args:
        record: ``run.json``.
        rows: of ``metrics.jsonl``.
        last_written: when either file was last changed, in seconds as ``time.time`` counts.
        now: by default ``time.time()``.
    """
    now = time.time() if now is None else now
    silent = max(0.0, now - last_written)
    taken = [row for row in rows if row.get("seconds") is not None]
    recent = [row["seconds"] for row in taken[-RECENT_STEPS:]]
    usual = statistics.median(recent) if recent else 0.0
    steps = max((row["step"] for row in rows), default=0)
    total = total_steps(record)
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
    wall, memory = record.get("wall_seconds", 0.0), record.get("peak_memory_bytes", 0)
    return Progress(status, reason, steps, total, wall, left, memory)


def _seconds(moment: Any) -> float | None:
    """A time of the record as ``time.time`` counts; None where it is none."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None


def memory(count: int) -> str:
    """Bytes as "786 MiB" or "17.2 GiB"."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
