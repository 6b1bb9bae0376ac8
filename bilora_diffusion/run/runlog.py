"""Writer of a run's record: ``run.json`` (the run as a whole) and ``metrics.jsonl`` (its steps).

``run.json`` is replaced atomically. ``metrics.jsonl`` gets one line of strict JSON per call of
`RunLog.metric`, which is written immediately. If the process is killed, at most the last line is
incomplete; readers skip it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..core.durable import (
    dump_json,
    strict_json,
    sync,
    write_text,
)
from . import provenance, snapshots
from .record import (
    HEARTBEAT_SECONDS,
    METRICS,
    RUN,
    SCHEMA_VERSION,
    VALIDATION,
    discard_later_steps,
    read_metrics,
    read_run,
)

CARD = "README.md"
ERROR = "error.txt"
# Options that are not recorded.
SECRETS = frozenset({"hub_token"})


class RunLog:
    """Writer of one run's record; create it only in the main process.

    Args:
        folder: the run folder, which is created if it is missing.
        device: the device that trains, for its name and peak memory; None for a GPU if there is
            one.
    """

    def __init__(self, folder: Path, device: torch.device | str | None = None) -> None:
        self.folder = Path(folder)
        self._device = device
        self._run: dict[str, Any] = {}
        self._metrics: BinaryIO | None = None
        # Times on the monotonic clock, in seconds.
        self._start_time = 0.0
        self._write_time = 0.0
        self._earlier_seconds = 0.0  # duration of the run before it was resumed

    def start(
        self,
        config: Mapping[str, Any],
        method: str,
        seed: int | None,
        resume_step: int | None,
        num_steps: int | None = None,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the record.

        For a resumed run, everything that was recorded for steps after ``resume_step`` is deleted,
        and the duration continues from the recorded one.

        Args:
            config: options of the run; secrets among them are not written.
            method: name of the method.
            seed: seed of the run.
            resume_step: step of the checkpoint to resume from; None for a new run, in a folder
                without an earlier one (see `folder.clear`).
            num_steps: total number of optimizer steps of the run.
            content: number and hash of the training samples and of the held-out samples.

        Raises:
            UserError: the earlier record is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        date = _date()
        earlier: dict[str, Any] = {}
        resumed: list[Any] = []
        removed_checkpoints: list[int] = []
        if resume_step is not None:
            # A checkpoint may have been copied without its record.
            if (self.folder / RUN).exists():
                earlier = read_run(self.folder)
            (self.folder / ERROR).unlink(missing_ok=True)  # the failed attempt is now repeated
            self._truncate(resume_step)
            resumed = list(earlier.get("resumed", []))
            resumed.append({"step": resume_step, "at": date})
            for step in earlier.get("removed_checkpoints", []):
                if step <= resume_step:
                    removed_checkpoints.append(step)
        commit, differs = provenance.commit()
        public_options = dict(config)
        for name in SECRETS:
            public_options.pop(name, None)
        self._run = {
            "schema_version": SCHEMA_VERSION,
            # The training.
            "config": public_options,
            "method": method,
            "seed": seed,
            "num_steps": num_steps,
            "content": content,
            # The code and the machine.
            "versions": provenance.versions(),
            "commit": commit,
            "uncommitted_changes": differs,
            "device": provenance.device(self._device),
            # Values that continue when the run is resumed.
            "started_at": earlier.get("started_at", date),
            "resumed": resumed,
            "wall_seconds": earlier.get("wall_seconds", 0.0),
            "peak_memory_bytes": earlier.get("peak_memory_bytes", 0),
            "removed_checkpoints": removed_checkpoints,
            # The current state.
            "status": "running",
            "card": earlier.get("card", False),
            "doing": "starting",
            "doing_since": date,
            "results": {},
        }
        self._earlier_seconds = self._run["wall_seconds"]
        self._start_time = time.monotonic()
        self._write()
        self._metrics = (self.folder / METRICS).open("ab", buffering=0)

    def metric(self, step: int, **values: Any) -> None:
        """Append one line, ``{"step": step, **values}``.

        A number that is not finite is written as null, and the line then has ``"nonfinite": true``.

        Raises:
            TypeError: JSON can't represent a value.
        """
        assert self._metrics is not None, "start was not called"
        line, has_nonfinite = strict_json({"step": int(step), **values})
        if has_nonfinite:
            line["nonfinite"] = True
        data = (json.dumps(line) + "\n").encode("ascii")
        # The file is unbuffered, so a line takes one system call. If the disk becomes full, only a
        # part of the line may be written.
        while data:
            written_bytes = self._metrics.write(data)
            data = data[written_bytes:]
        if time.monotonic() - self._write_time > HEARTBEAT_SECONDS:
            self._write()

    def record_activity(self, activity: str) -> None:
        """Record the activity that the run starts now, such as "held-out loss".

        The record distinguishes a run that is busy with something long from one that hangs.
        """
        self._run |= {"doing": activity, "doing_since": _date()}
        self._write()

    def sync(self) -> None:
        """Flush the record to the disk.

        This is called before a checkpoint is saved, so that after a power failure no line up to its
        step is missing.
        """
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            self._write()

    def close(self, status: str, reason: str | None = None, **results: Any) -> None:
        """Close the record.

        Args:
            status: "finished", "failed" or "interrupted"; a resumed run opens the record again.
            reason: the error of a failed run, in one sentence.
            results: results to add to the record's.
        """
        self._run["status"] = status
        self._run["results"] |= results
        if reason is not None:
            self._run["error"] = reason
        self.sync()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def record_removed_checkpoints(self, steps: Sequence[int]) -> None:
        """Record that the checkpoints of these steps were deleted in favor of newer ones."""
        self._run["removed_checkpoints"] += steps
        self._write()

    def record_card(self) -> None:
        """Record that the run is about to write the folder's ``README.md``."""
        self._run["card"] = True
        self._write()

    def _write(self) -> None:
        self._write_time = time.monotonic()
        seconds = self._earlier_seconds + self._write_time - self._start_time
        self._run["wall_seconds"] = round(seconds, 3)
        peak = provenance.peak_memory(self._device)
        self._run["peak_memory_bytes"] = max(self._run["peak_memory_bytes"], peak)
        record, _ = strict_json(self._run)
        write_text(self.folder / RUN, dump_json(record))

    def _truncate(self, step: int) -> None:
        """Delete everything that was recorded for steps after this one."""
        text = ""
        for line in read_metrics(self.folder):
            if line["step"] <= step:
                text += json.dumps(line, allow_nan=False) + "\n"
        write_text(self.folder / METRICS, text)
        sync(self.folder)
        snapshots.truncate(self.folder, step)
        discard_later_steps(self.folder / VALIDATION, step)


def _date() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run."""
    return (folder / RUN).exists() and read_run(folder)["status"] == "finished"
