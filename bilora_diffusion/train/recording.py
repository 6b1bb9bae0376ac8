"""Words of a run around its loop: before it, where it shows images, how it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config.run import RunConfig
from ..core.choices import OPTIMIZERS
from ..core.durable import (
    bytes_for_people,
    disk_is_full,
    free_bytes,
    full_disk_sentence,
)
from ..core.errors import (
    Diverged,
    TrainingError,
    UserError,
    keep_trace,
    unexpected,
)
from ..core.files import counted
from ..methods import Method
from ..run import provenance
from ..run.record import read_metrics
from ..run.runlog import RunLog
from .trainer import Trainer

LINE = 400  # bytes of a line of metrics
PNG = 1.5  # bytes of a pixel
logger = logging.getLogger(__name__)


def announce(trainer: Trainer, folder: Path) -> None:
    """Say what is about to be trained on what, for how long, where, and where to; and whether the
    disk will plainly not hold it.
    """
    cfg, steps, size = trainer.cfg, trainer.last_step, trainer.schedule.step_size
    epochs = steps * size / trainer.task.num_samples
    many, device = trainer.accelerator.num_processes, trainer.accelerator.device
    processes = f"{many} processes on " if many > 1 else ""
    facts = [
        trainer.task.data_summary(),
        f"{counted(f'{steps:,}', 'step')} of {size} ({counted(f'{epochs:.3g}', 'epoch')})",
        _trained(trainer.method, cfg),
        f"{processes}{provenance.device(device)['name']},"
        f" {cfg.mixed_precision.replace('no', 'fp32')}",
        *([f"from step {trainer.step}"] if trainer.step else []),
        f"into {folder}",
    ]
    logger.info("; ".join(facts))
    left, needed = free_bytes(folder), bytes_to_write(trainer)
    if left is not None and left < needed:
        logger.warning(
            "the disk that holds %s has %s left, and this run writes about %s: make room, or save"
            " less with --checkpoints_total_limit 1",
            *(folder, bytes_for_people(left), bytes_for_people(needed)),
        )


def _trained(method: Method, cfg: RunConfig) -> str:
    count = sum(p.numel() for p in method.clip_parameters())
    weights = f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    if method.exports_weights:
        return f"{method.title} of {weights} weights"
    layers = len(method.layers())
    return f"{method.title} of rank {cfg.rank} on {layers:,} layers ({weights} parameters)"


def bytes_to_write(trainer: Trainer) -> int:
    """Bytes that a run still writes, roughly: checkpoints, exported file, images, snapshots."""
    cfg, method = trainer.cfg, trainer.method
    ahead = trainer.last_step - trainer.step
    trained = sum(t.numel() * t.element_size() for t in method.tensors().values())
    state = OPTIMIZERS[cfg.optimizer.lower()].state
    saved = ahead // cfg.checkpointing_steps
    if cfg.checkpoints_total_limit:  # one more is written before the oldest goes
        saved = min(saved, cfg.checkpoints_total_limit + 1)
    snapshots = 0 if trainer.dynamics is None else ahead // trainer.dynamics.interval_steps
    each = 1 + state + (1 if cfg.keep_best else 0)
    tensors = (saved * each + snapshots + 1) * trained
    every = trainer.validation_steps
    images = len(cfg.sampled_prompts) * (max(ahead // every, 1) if every else 1)
    pixels = images * cfg.resolution**2
    return int(tensors + pixels * PNG + ahead * LINE)


def warn_of_zero_auxiliary(folder: Path) -> None:
    """Say that a run with an auxiliary was plain LoRA, where its norm was 0 in every step."""
    norms = [row["auxiliary_norm"] for row in read_metrics(folder) if "auxiliary_norm" in row]
    if norms and all(norm == 0 for norm in norms):
        logger.warning(
            "the auxiliary was 0 in every step of %s, so this run is plain LoRA: look at --rho,"
            " --auxiliary_learning_rate and the schedule of the learning rate",
            folder,
        )


def show_images(trainer: Trainer, folder: Path, step: int) -> None:
    """Show the images of ``validation/step-N`` in TensorBoard and in Weights & Biases, as
    diffusers' scripts send them, at the trainer's own step.
    """
    files = sorted((folder / "validation" / f"step-{step}").glob("*.png"))
    if not files:
        return
    images = [Image.open(file).convert("RGB") for file in files]
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            batches = {f"validation {n:03d}": np.asarray(i)[None] for n, i in enumerate(images)}
            if len({image.size for image in images}) == 1:
                batches = {"validation": np.concatenate([*batches.values()])}
            tracker.log_images(batches, step=trainer.step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            pairs = zip(images, trainer.cfg.sampled_prompts, strict=True)
            shown = [wandb.Image(image, caption=prompt) for image, prompt in pairs]
            tracker.log({"validation": shown}, step=trainer.step)


@contextlib.contextmanager
def recorded(log: RunLog | None, folder: Path, trainer: Trainer | None = None) -> Iterator[None]:
    """Within the context, whatever ends the run is written into its record, which the main process
    has, and goes on its way. The trace of an error that nobody foresaw is kept in the run folder.

    Raises:
        TrainingError: the disk is full.
    """
    try:
        yield
    except KeyboardInterrupt:
        _close(log, "interrupted")
        raise
    except Exception as error:
        if disk_is_full(error):
            needed = None if trainer is None else bytes_to_write(trainer)
            reason = full_disk_sentence(error, folder, needed)
            _close(log, "failed", reason)
            raise TrainingError(reason) from error
        foreseen = isinstance(error, UserError | TrainingError)
        if not foreseen:
            keep_trace(error, folder)
        why = {"diverged": True} if isinstance(error, Diverged) else {}
        _close(log, "failed", str(error) if foreseen else unexpected(error), **why)
        raise


def _close(log: RunLog | None, status: str, reason: str | None = None, **results: Any) -> None:
    with contextlib.suppress(OSError):  # on a full disk the record stays as it was
        if log is not None:
            log.close(status, reason, **results)
