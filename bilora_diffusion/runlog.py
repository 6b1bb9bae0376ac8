"""The record of a run: ``run.json`` (what, where, how long) and ``metrics.jsonl`` (step by step).

    log = RunLog(folder)
    log.start(config, method="bilora", seed=0, resume_step=None)
    log.metric(1, loss=0.5, lr=2e-4)
    log.finish(heldout_loss=0.08)

``run.json`` is replaced atomically; ``metrics.jsonl`` is strict JSON, one line per call, each
written at once, so that a kill leaves at most one torn last line, which readers skip.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import checkpoint, provenance, snapshots
from .durable import dump_json, strict_json, sync, write_text
from .errors import UserError
from .lora_names import FILE_NAME, KOHYA_FILE_NAME_BEFORE, kohya_file_name
from .methods import get
from .model_card import write_card

__all__ = ["RunLog", "guard", "read_metrics", "read_run", "write_card"]

SCHEMA_VERSION = 1
RUN, METRICS = "run.json", "metrics.jsonl"
SECRETS = frozenset({"hub_token"})
# By these a folder is known to hold a run.
RESULTS = (
    METRICS,
    checkpoint.CHECKPOINTS,
    FILE_NAME,
    KOHYA_FILE_NAME_BEFORE,
    "adapter_model.safetensors",
    "adapter_config.json",
)
# What else a run leaves, and a fresh start deletes.
BESIDES = ("validation", "logs", "README.md", snapshots.FOLDER)
WHOLE_MODELS = ("unet", "text_encoder", "text_encoder_2", "model")  # what full fine-tuning leaves
HEARTBEAT_SECONDS = 15.0


class RunLog:
    """Writes one run's record; make it in the main process only.

    Args:
        folder: the run folder; made when missing.
        device: what is trained on, for the machine's name and the peak memory; by default the GPU
            when there is one.
    """

    def __init__(self, folder: Path, device: torch.device | str | None = None) -> None:
        self.folder = Path(folder)
        self._device = device
        self._run: dict[str, Any] = {}
        self._metrics: BinaryIO | None = None
        self._began = self._written = 0.0
        self._before = 0.0

    def start(
        self,
        config: Mapping[str, Any],
        method: str,
        seed: int | None,
        resume_step: int | None,
        num_steps: int | None = None,
    ) -> None:
        """Open the record.

        A fresh start (``resume_step`` None) deletes what an earlier run left here, which
        :func:`guard` must have allowed. Otherwise lines and snapshots of steps after
        ``resume_step`` go, and the time spent before counts on.

        Args:
            config: JSON-able; secrets in it are not written.
            method: name of the method.
            seed: of data, noise and initialization.
            resume_step: step of the checkpoint that is continued.
            num_steps: optimizer steps of the whole run.

        Raises:
            UserError: when the earlier record is damaged, or the folder is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: give a folder as --output_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier: dict[str, Any] = {}
        if resume_step is None:
            self._clear()
        else:
            earlier = read_run(self.folder) if (self.folder / RUN).exists() else {}
            self._truncate(resume_step)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        commit, differs = provenance.commit()
        resumed = [{"step": resume_step, "at": now}] if resume_step is not None else []
        self._run = {
            "schema_version": SCHEMA_VERSION,
            "config": {key: value for key, value in config.items() if key not in SECRETS},
            "method": method,
            "seed": seed,
            "num_steps": num_steps,
            "versions": provenance.versions(),
            "commit": commit,
            "uncommitted_changes": differs,
            "device": provenance.device(self._device),
            "started_at": earlier.get("started_at", now),
            "resumed": [*earlier.get("resumed", []), *resumed],
            "wall_seconds": earlier.get("wall_seconds", 0.0),
            "peak_memory_bytes": earlier.get("peak_memory_bytes", 0),
            "status": "running",
            "doing": "starting",
            "doing_since": now,
            "results": {},
        }
        self._before = self._run["wall_seconds"]
        self._began = time.monotonic()
        self._write()
        self._metrics = (self.folder / METRICS).open("ab", buffering=0)

    def metric(self, step: int, **values: Any) -> None:
        """Append one line, ``{"step": step, **values}``.

        A number that is not finite is written as null, and the line then has ``"nonfinite": true``.

        Raises:
            TypeError: for a value that JSON cannot hold.
        """
        if self._metrics is None:
            raise RuntimeError("RunLog.metric needs RunLog.start first")
        line, odd = strict_json({"step": int(step), **values, "nonfinite": False})
        if odd:
            line["nonfinite"] = True
        else:
            del line["nonfinite"]
        text = json.dumps(line, allow_nan=False, separators=(", ", ": ")) + "\n"
        data = text.encode("ascii")  # unbuffered: one system call for one line
        while data:  # a disk that is nearly full takes a part of it, and refuses the rest
            data = data[self._metrics.write(data) :]
        if time.monotonic() - self._written > HEARTBEAT_SECONDS:
            self._write()

    def doing(self, what: str) -> None:
        """Write down what the run does from now on, such as "held-out loss".

        So others can tell a run that is busy with something long from one that hangs.
        """
        self._run["doing"] = what
        self._run["doing_since"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._write()

    def sync(self) -> None:
        """Flush the record to the disk; call it before a checkpoint is saved.

        Then no line up to the checkpoint's step can be missing after a power failure.
        """
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            self._write()

    def finish(self, **results: Any) -> None:
        """Close the record as "finished" with what came out.

        Args:
            results: JSON-able; a number that is not finite is written as null.
        """
        self._run["results"] = {**self._run["results"], **results}
        self._close("finished")

    def fail(self, reason: str) -> None:
        """Close the record as "failed", with one sentence why."""
        self._run["error"] = reason
        self._close("failed")

    def interrupt(self) -> None:
        """Close the record as "interrupted": it goes on with the next resume."""
        self._close("interrupted")

    def _close(self, status: str) -> None:
        self._run["status"] = status
        self.sync()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _write(self) -> None:
        self._written = time.monotonic()
        self._run["wall_seconds"] = round(self._before + self._written - self._began, 3)
        peak = provenance.peak_memory(self._device)
        self._run["peak_memory_bytes"] = max(self._run["peak_memory_bytes"], peak)
        record, _ = strict_json(self._run)
        write_text(self.folder / RUN, dump_json(record))

    def _clear(self) -> None:
        """Delete an earlier run; its ``run.json`` goes last, so that a crash leaves it known."""
        if not _holds_run(self.folder):
            return
        whole = WHOLE_MODELS if _trained_whole(self.folder) else ()
        for name in (*BESIDES, *whole, *RESULTS, kohya_file_name(self.folder), RUN):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()

    def _truncate(self, step: int) -> None:
        kept = [line for line in read_metrics(self.folder) if line["step"] <= step]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
        write_text(self.folder / METRICS, text)
        sync(self.folder)
        snapshots.truncate(self.folder, step)


def guard(folder: Path, resume: str | Path | None, overwrite: bool) -> None:
    """Refuse an output folder that cannot be used, before anything is loaded or trained.

    Args:
        folder: ``--output_dir``; need not exist. Nothing in it is changed.
        resume: ``--resume_from_checkpoint`` as given, or the checkpoint it was resolved to.
        overwrite: ``--overwrite_output_dir``.

    Raises:
        UserError: when ``folder`` is a file or cannot be written, or holds a run that is neither
            resumed nor to be overwritten.
    """
    folder = Path(folder)
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file: give a folder as --output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable: give another --output_dir")
    if resume is not None and overwrite:
        raise UserError(
            "--overwrite_output_dir deletes what --resume_from_checkpoint continues: give one of "
            "the two"
        )
    if overwrite or not _holds_run(folder):
        return
    if resume is None:
        raise UserError(
            f"{folder} holds another run: give another --output_dir, continue it with "
            "--resume_from_checkpoint latest, or delete it with --overwrite_output_dir"
        )
    if resume == "auto" and checkpoint.latest(folder) is None:
        # Starting afresh is right after a kill before the first checkpoint, not after a whole run.
        if not (folder / RUN).exists() or read_run(folder).get("status") == "finished":
            raise UserError(
                f"{folder} holds a finished run without a checkpoint: give another --output_dir, "
                "or delete it with --overwrite_output_dir"
            )
        return
    found = checkpoint.resolve(folder, resume)
    if found is not None and folder.resolve() not in found.resolve().parents:
        raise UserError(
            f"{folder} holds another run than checkpoint {found}: give another --output_dir, or a "
            f"checkpoint in {folder / checkpoint.CHECKPOINTS}"
        )


def refuse_foreign_models(folder: Path) -> None:
    """Refuse a folder in which full fine-tuning would replace models that are not its own.

    Raises:
        UserError: it holds such models.
    """
    for name in WHOLE_MODELS:
        if (folder / name).exists() and not _trained_whole(folder):
            raise UserError(
                f"{folder / name} exists and is not of a run of full fine-tuning, which would "
                "replace it: give another --output_dir"
            )


def _trained_whole(folder: Path) -> bool:
    return (folder / RUN).exists() and get(read_run(folder)["method"]).exports_weights


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RUN, *RESULTS, kohya_file_name(folder)))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` in order, a torn last one left out; empty without the file.

    Raises:
        UserError: when another line is no JSON object with a step.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its rights") from error
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends with a newline
        try:
            values = json.loads(line)
            int(values["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} of {path} is not a metrics line: delete it, or start a new run"
            ) from error
        found.append(values)
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Raises:
        UserError: when there is none, or it is damaged or of an unknown schema version.
    """
    path = Path(folder) / RUN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["schema_version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is not a run folder (it has no {RUN}): give another") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its rights") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete it, or give another run folder") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version!r}, but this version of bilora_diffusion reads "
            f"{SCHEMA_VERSION}: read it with the version that wrote it"
        )
    return record
