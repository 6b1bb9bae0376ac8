"""A run as the viewer has it: its name, first prompt and state, and the pair to see first."""

from __future__ import annotations

import contextlib
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
from bilora_diffusion.run.record import HEARTBEAT_SECONDS

CONTROL, OURS = "lora", "bilora"
"""The pair that is shown before anything is chosen."""
STALE_SECONDS = 12 * HEARTBEAT_SECONDS
"""A run that trained and was silent for so long is shown as stalled."""
BUSY_SECONDS = 3600.0
"""The same for a run that said that it does something else than steps, such as images."""
TRAINING = "training"
RECENT_STEPS = 50
PROMPT = "a TOK icon of a rabbit, in the style of TOK"
"""A prompt for the miniature, where a run has none."""


@dataclass(frozen=True)
class RunItem:
    """A run folder.

    Args:
        path: of the folder.
        name: what lists and legends show, such as "dog (Bi-LoRA, seed 0)"; unique.
        record: ``run.json``.
        weights: file of the exported LoRA, or the folder of whole models; None while there is none.
        steps: at which validation images were made, in order.
        checkpoints: steps of the checkpoints that are there, in order.
        data_hash: of the samples and noise of the first step; None before it.
    """

    path: str
    name: str
    record: dict[str, Any]
    weights: str | None
    steps: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()
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
    """A method's title; its name where this version does not know it."""
    try:
        return methods.get(method).title
    except UserError:
        return method


def short(value: float | str) -> str:
    """A radius in few letters: a number, or the word for one that sets itself."""
    return value if isinstance(value, str) else f"{value:g}"


def label(folder: str, record: dict[str, Any]) -> str:
    """A run's name: the folder that the user chose first, so that typing it finds the run."""
    description = title(record["method"])
    if record.get("seed") is not None:
        description += f", seed {record['seed']}"
    return f"{folder} ({description})"


def ordered(runs: Sequence[RunItem]) -> list[RunItem]:
    """The runs as they are listed: plain LoRA first, as the control, then by method and seed."""
    return sorted(runs, key=lambda run: (run.method != CONTROL, run.method, str(run.seed)))


def pair(runs: Sequence[RunItem]) -> list[RunItem]:
    """The two runs that are compared at first; fewer where there are fewer.

    Best are LoRA and Bi-LoRA on the same data, then two runs that have images of the same prompts.
    """
    couples = itertools.combinations(ordered(runs), 2)
    return list(max(couples, key=likeness, default=runs))


def likeness(couple: tuple[RunItem, RunItem]) -> tuple[int, ...]:
    """How well two runs compare, by what matters most first."""
    a, b = couple
    shared_prompts = len(set(a.prompts) & set(b.prompts))
    return (
        # on the same samples with the same noise
        a.data_hash is not None and a.data_hash == b.data_hash,
        shared_prompts > 0,
        {a.method, b.method} == {CONTROL, OURS},
        shared_prompts,
        a.seed == b.seed,
        PurePosixPath(a.path).parent == PurePosixPath(b.path).parent,
    )


def suggest_prompt(prompt: str | None, run: RunItem, runs: Sequence[RunItem]) -> str:
    """The run's first prompt, unless the user has written another than those of the runs."""
    suggestions = {PROMPT, *(run.first_prompt for run in runs)}
    if prompt and prompt.strip() not in suggestions:
        return prompt
    return run.first_prompt


@dataclass(frozen=True)
class Progress:
    """State of a run.

    Args:
        status: "running", "finished", "interrupted", "failed" or "stalled"; of a running one that
            is busy with something else than steps, its name, such as "validation images".
        reason: of a failed or a stalled run, in one sentence; "" otherwise.
        total: steps to do; None where it is not known.
        wall_seconds, left_seconds: spent over all resumes; and to go, by the recent steps.
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
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    last_written: float,
    current_time: float | None = None,
) -> Progress:
    """The state of a run by ``run.json`` and ``metrics.jsonl``, of which one was last written at a
    time as ``time.time`` counts.
    """
    current_time = time.time() if current_time is None else current_time
    silent = max(0.0, current_time - last_written)
    recent = [row["seconds"] for row in rows if row.get("seconds") is not None][-RECENT_STEPS:]
    usual = statistics.median(recent) if recent else 0.0
    steps = max((row["step"] for row in rows), default=0)
    total = record.get("num_steps") or record["config"].get("max_train_steps")
    status, reason = record["status"], record.get("error") or ""
    doing = record.get("doing") or TRAINING
    # A run that trains writes at every step; one that makes images may be silent for long.
    patience = STALE_SECONDS if doing == TRAINING else BUSY_SECONDS
    running = status == "running"
    if running and silent > max(patience, 10 * usual):
        running, status = False, "stalled"
        reason = f"it has written nothing for {duration(silent)}: it was probably killed"
    elif running and doing != TRAINING:
        status, reason = doing, ""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            since = datetime.fromisoformat(record["doing_since"]).timestamp()
            reason = f"since {duration(max(0.0, current_time - since))}"
    left = None
    if running and total is not None and recent:
        left = max(0, total - steps) * usual
    wall, peak = record.get("wall_seconds", 0.0), record.get("peak_memory_bytes", 0)
    return Progress(status, reason, steps, total, wall, left, peak)
