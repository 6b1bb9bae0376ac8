"""A run as the viewer has it: its name, prompts and progress, and the pair to compare first."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import duration
from bilora_diffusion.run.record import HEARTBEAT_SECONDS, TRAINING_ACTIVITY

# Methods of the pair that is shown before anything is chosen.
CONTROL, OURS = "lora", "bilora"
# Silence after which a training run is shown as stalled.
STALE_SECONDS = 12 * HEARTBEAT_SECONDS
# The same for a run that does something else than steps, such as validation images.
BUSY_SECONDS = 3600.0
# Steps whose median gives the time that is left.
RECENT_STEPS = 50
# A prompt for the miniature, where a run has none.
PROMPT = "a TOK icon of a rabbit, in the style of TOK"


@dataclass(frozen=True)
class RunItem:
    """A run folder."""

    path: str
    # Name in lists and legends, such as "dog (Bi-LoRA, seed 0)"; unique
    name: str
    # Content of ``run.json``
    record: dict[str, Any]
    # File of the exported LoRA, or folder of whole models; None before the export
    weights: str | None
    # Steps with validation images, in order
    steps: tuple[int, ...] = ()
    # Steps with a checkpoint, in order
    checkpoints: tuple[int, ...] = ()
    # Hash of the samples and noise of the first step; None before it
    data_hash: str | None = None

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.record["method"]

    @property
    def seed(self) -> int | None:
        """The seed of training, where the record has one."""
        return self.record.get("seed")

    @property
    def status(self) -> str:
        """ "running", "finished", "interrupted" or "failed"."""
        return self.record["status"]

    @property
    def is_text(self) -> bool:
        """Test that it trains a language model."""
        return "model_name_or_path" in self.record["config"]

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of its validation images, in order; none where it makes no images."""
        config = self.record["config"]
        if not config.get("num_validation_images"):
            return ()
        return tuple(dict.fromkeys(config.get("validation_prompts") or ()))

    @property
    def first_prompt(self) -> str:
        """The first prompt of its validation images, else the prompt that it is trained on."""
        if self.prompts:
            return self.prompts[0]
        instance_prompt = self.record["config"].get("instance_prompt")
        return instance_prompt if isinstance(instance_prompt, str) else PROMPT


def title(method: str) -> str:
    """A method's title; its name if this version does not know the method."""
    try:
        return methods.get(method).title
    except UserError:
        return method


def label(folder: str, record: dict[str, Any]) -> str:
    """A run's name. It begins with the folder, so that typing this finds the run in a list."""
    description = title(record["method"])
    if record.get("seed") is not None:
        description += f", seed {record['seed']}"
    return f"{folder} ({description})"


def ordered(runs: Sequence[RunItem]) -> list[RunItem]:
    """Sort runs for a list: plain LoRA first, as the control, then by method and seed."""
    return sorted(runs, key=lambda run: (run.method != CONTROL, run.method, str(run.seed)))


def control_of(run: RunItem, runs: Sequence[RunItem]) -> RunItem | None:
    """The first plain LoRA run with the same seed and data; None if that is the run itself."""
    key = (run.seed, run.is_text, run.data_hash)
    for control in runs:
        control_key = (control.seed, control.is_text, control.data_hash)
        if control.method == CONTROL and control_key == key:
            return None if control is run else control
    return None


def newest(runs: Sequence[RunItem]) -> list[RunItem]:
    """Sort runs by their start, the newest first."""
    return sorted(runs, key=lambda run: str(run.record.get("started_at")), reverse=True)


def pair(runs: Sequence[RunItem]) -> list[RunItem]:
    """The two runs to compare first; fewer if there are fewer.

    The best pair is LoRA and Bi-LoRA on the same data, then two runs with images of the same
    prompts.
    """
    couples = itertools.combinations(ordered(runs), 2)
    return list(max(couples, key=likeness, default=runs))


def likeness(couple: tuple[RunItem, RunItem]) -> tuple[int, ...]:
    """How well two runs compare, the most important property first; larger is better."""
    a, b = couple
    shared_prompts = len(set(a.prompts) & set(b.prompts))
    return (
        # The same samples with the same noise.
        a.data_hash is not None and a.data_hash == b.data_hash,
        shared_prompts > 0,
        {a.method, b.method} == {CONTROL, OURS},
        shared_prompts,
        a.seed == b.seed,
        PurePosixPath(a.path).parent == PurePosixPath(b.path).parent,
    )


def suggest_prompt(prompt: str | None, run: RunItem, runs: Sequence[RunItem]) -> str:
    """The first prompt of a run, unless the user has written one that is no run's."""
    suggestions = {PROMPT, *(run.first_prompt for run in runs)}
    if prompt and prompt.strip() not in suggestions:
        return prompt
    return run.first_prompt


@dataclass(frozen=True)
class Progress:
    """What a run is doing, and how far it is."""

    # "running", "finished", "interrupted", "failed" or "stalled"; for a run that is busy with
    # something else than steps, the name of that, such as "validation images"
    status: str
    # Sentence about a failed or a stalled run; "" otherwise
    reason: str
    # Done, and of the whole run; None if not known
    steps: int
    total: int | None
    # Over all resumes
    wall_seconds: float
    # Time that is left, by the recent steps; None if not known
    left_seconds: float | None
    # Peak memory of the accelerator, or of the process on a CPU
    peak_memory_bytes: int


def progress(
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    last_written: float,
    current_time: float | None = None,
) -> Progress:
    """Find the progress of a run.

    Args:
        record: content of ``run.json``.
        rows: rows of ``metrics.jsonl``.
        last_written: time at which one of these files was last written, in seconds since the epoch.
        current_time: time now; None for that of the clock.
    """
    if current_time is None:
        current_time = time.time()
    silent_seconds = max(0.0, current_time - last_written)
    step_times = [row["seconds"] for row in rows if row.get("seconds") is not None]
    step_seconds = 0.0
    if step_times:
        step_seconds = statistics.median(step_times[-RECENT_STEPS:])
    steps = max((row["step"] for row in rows), default=0)
    total = record.get("num_steps") or record["config"].get("max_train_steps")
    status = record["status"]
    reason = record.get("error") or ""
    activity = record.get("doing") or TRAINING_ACTIVITY
    # A run that trains writes at every step; one that samples images may be silent for long.
    patience = STALE_SECONDS if activity == TRAINING_ACTIVITY else BUSY_SECONDS
    is_running = status == "running"
    if is_running and silent_seconds > max(patience, 10 * step_seconds):
        is_running = False
        status = "stalled"
        reason = f"it has written nothing for {duration(silent_seconds)}: it was probably killed"
    elif is_running and activity != TRAINING_ACTIVITY:
        status = activity
        started_at = datetime.fromisoformat(record["doing_since"]).timestamp()
        reason = f"for {duration(max(0.0, current_time - started_at))}"
    left_seconds = None
    if is_running and total is not None and step_times:
        left_seconds = max(0, total - steps) * step_seconds
    return Progress(
        status,
        reason,
        steps,
        total,
        wall_seconds=record.get("wall_seconds", 0.0),
        left_seconds=left_seconds,
        peak_memory_bytes=record.get("peak_memory_bytes", 0),
    )
