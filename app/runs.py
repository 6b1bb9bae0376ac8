"""Runs in the viewer: their names, prompts and progress, and the pair that is compared first."""

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

# Methods of the pair that is shown before the user chooses
CONTROL, OURS = "lora", "bilora"
# Minimum time in seconds without output after which a run in training counts as stalled
STALE_SECONDS = 12 * HEARTBEAT_SECONDS
# The same time during another activity, such as validation images
BUSY_SECONDS = 3600.0
# Number of the last steps whose median duration predicts the remaining time
RECENT_STEPS = 50
# Prompt for runs that have none
PROMPT = "a TOK icon of a rabbit, in the style of TOK"


@dataclass(frozen=True)
class RunItem:
    """A run folder."""

    path: str
    # Unique name in lists and legends, such as "dog (Bi-LoRA, seed 0)"
    name: str
    # Content of ``run.json``
    record: dict[str, Any]
    # Path of the exported adapter file or full model's folder; None before the export
    weights: str | None
    # Steps with validation images, in order
    steps: tuple[int, ...] = ()
    # Steps with a checkpoint, in order
    checkpoints: tuple[int, ...] = ()
    # Hash of the first step's samples and noise; None before the first step
    data_hash: str | None = None

    @property
    def method(self) -> str:
        """Name of the method, such as "bilora"."""
        return self.record["method"]

    @property
    def seed(self) -> int | None:
        """Seed of training; None if the record has none."""
        return self.record.get("seed")

    @property
    def started_at(self) -> str:
        """Start time in ISO 8601, which can be sorted as text; "" if the record has none."""
        return str(self.record.get("started_at") or "")

    @property
    def status(self) -> str:
        """ "running", "finished", "interrupted" or "failed"."""
        return self.record["status"]

    @property
    def guided_target(self) -> float:
        """Guidance scale that the run was trained towards; 1 for none."""
        return guided_target(self.record)

    @property
    def is_text(self) -> bool:
        """Whether the run trains a language model."""
        return "model_name_or_path" in self.record["config"]

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the validation images, in order; empty if the run generates none."""
        config = self.record["config"]
        if not config.get("num_validation_images"):
            return ()
        return tuple(dict.fromkeys(config.get("validation_prompts") or ()))

    @property
    def first_prompt(self) -> str:
        """First prompt of the validation images, else the instance prompt, else `PROMPT`."""
        if self.prompts:
            return self.prompts[0]
        instance_prompt = self.record["config"].get("instance_prompt")
        return instance_prompt if isinstance(instance_prompt, str) else PROMPT


def guided_target(record: Mapping[str, Any]) -> float:
    """Return the guidance scale that a run was trained towards.

    It is 1 for none, and for records of earlier versions, which lack the option.
    """
    value = record["config"].get("guided_target")
    return float(value) if type(value) in (int, float) else 1.0


def method_title(method: str) -> str:
    """Return the title of a method; its name if this version does not have the method."""
    try:
        return methods.get(method).title
    except UserError:
        return method


def run_name(folder: str, record: dict[str, Any]) -> str:
    """Return the name of a run; it begins with the folder, so that typing finds it in a list."""
    description = method_title(record["method"])
    target = guided_target(record)
    if target > 1:
        description += f", guided target {target:g}"
    if record.get("seed") is not None:
        description += f", seed {record['seed']}"
    return f"{folder} ({description})"


def sort_runs(runs: Sequence[RunItem]) -> list[RunItem]:
    """Sort runs for a list: LoRA first, because it is the control, then by method and seed.

    Runs with a guided target come last.
    """

    def rank(run: RunItem) -> tuple[Any, ...]:
        return run.guided_target, run.method != CONTROL, run.method, str(run.seed)

    return sorted(runs, key=rank)


def find_control(run: RunItem, runs: Sequence[RunItem]) -> RunItem | None:
    """Return the first LoRA run with the same seed, data and guided target.

    Return None if there is no such run, or if it is `run` itself.
    """

    def key(run: RunItem) -> tuple[Any, ...]:
        return run.seed, run.is_text, run.data_hash, run.guided_target

    for control in runs:
        if control.method == CONTROL and key(control) == key(run):
            return None if control is run else control
    return None


def sort_newest_first(runs: Sequence[RunItem]) -> list[RunItem]:
    """Sort runs by their start time, newest first."""
    return sorted(runs, key=lambda run: run.started_at, reverse=True)


def choose_pair(runs: Sequence[RunItem]) -> list[RunItem]:
    """Choose the two runs that are compared first; all runs if there are fewer than two.

    The best pair is the newest pair of LoRA and Bi-LoRA on the same data with a common prompt. See
    `comparability` for the order of all other pairs.
    """
    pairs = itertools.combinations(sort_runs(runs), 2)
    return list(max(pairs, key=comparability, default=runs))


def comparability(pair: tuple[RunItem, RunItem]) -> tuple[Any, ...]:
    """Rate how well two runs can be compared, as a sort key with the most important part first."""
    a, b = pair
    shared_prompts = len(set(a.prompts) & set(b.prompts))
    # Both runs get the same samples with the same noise.
    has_same_data = a.data_hash is not None and a.data_hash == b.data_hash
    start_times = sorted((a.started_at, b.started_at))
    return (
        has_same_data,
        shared_prompts > 0,
        {a.method, b.method} == {CONTROL, OURS} and a.guided_target == b.guided_target,
        start_times if has_same_data else [],
        shared_prompts,
        a.seed == b.seed,
        PurePosixPath(a.path).parent == PurePosixPath(b.path).parent,
        start_times,
    )


def suggest_prompt(prompt: str | None, run: RunItem, runs: Sequence[RunItem]) -> str:
    """Return the first prompt of a run, unless the user has written another prompt."""
    suggestions = {PROMPT, *(run.first_prompt for run in runs)}
    if prompt and prompt.strip() not in suggestions:
        return prompt
    return run.first_prompt


@dataclass(frozen=True)
class Progress:
    """Status and progress of a run."""

    # "running", "finished", "interrupted", "failed", "stalled" or "unreadable". During another
    # activity than training steps, it is the name of the activity, such as "validation images".
    status: str
    # Explanation of the status: an error, the silence of a stalled run, or the time since the
    # activity began; "" for none
    reason: str
    # Number of completed steps
    steps: int
    # Number of steps of the full run; None if unknown
    total: int | None
    # Training time, summed over all resumes
    wall_seconds: float
    # Remaining time, predicted from the last steps; None if unknown
    left_seconds: float | None
    # Peak memory of the accelerator, or of the process on a CPU
    peak_memory_bytes: int


def find_progress(
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    last_written: float,
    current_time: float | None = None,
) -> Progress:
    """Determine the progress of a run from its record and log.

    Args:
        record: content of ``run.json``.
        rows: rows of ``metrics.jsonl``.
        last_written: time of the last write to these files, in seconds since the epoch.
        current_time: current time in seconds since the epoch; None to read the clock.
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
    # A run writes a line at every step, but may write nothing for a long time during other
    # activities, such as sampling images.
    patience = STALE_SECONDS if activity == TRAINING_ACTIVITY else BUSY_SECONDS
    is_running = status == "running"
    if is_running and silent_seconds > max(patience, 10 * step_seconds):
        is_running = False
        status = "stalled"
        reason = f"it wrote nothing for {duration(silent_seconds)} and was probably killed"
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
