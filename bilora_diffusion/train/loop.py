"""The training loop, for every task and method: steps, and what falls due between them.

`run` is the loop; `trainer.Trainer.train_step` is its step. Held-out losses and validation images
go into the run's record and to the trackers, and so does whatever ends a run.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..core.durable import disk_is_full
from ..core.errors import (
    Diverged,
    TrainingError,
    UserError,
    keep_trace,
    unexpected,
)
from ..run.console import Bar
from ..run.record import read_metrics, validation_folder
from ..run.runlog import RunLog
from . import resume
from .engine import Blocks
from .trainer import Trainer

logger = logging.getLogger(__name__)


def run(trainer: Trainer, folder: Path, log: RunLog | None) -> None:
    """Train to the end: steps, metrics, held-out loss, validation images and checkpoints.

    An interruption ends the loop earlier, after a step that is saved.

    Args:
        trainer: Trainer that takes the steps.
        folder: run folder.
        log: record of the main process; the other processes have none.
    """
    cfg = trainer.cfg
    record_activity = None if log is None else log.record_activity
    # An error closes the bar, so that its sentence has a line of its own.
    with Bar(trainer.num_steps, trainer.step, trainer.method.name, record_activity) as bar:
        if trainer.step == 0:
            with bar.waiting_for("starting values"):
                trainer.initialise()
            if trainer.dynamics is not None:
                trainer.dynamics.write(folder)
            measure_heldout_loss(trainer, log, bar)
            if cfg.eval_on_start:
                validate(trainer, folder, log, bar)
        # From here on there is something to save: a signal waits for the end of a step.
        trainer.interruption.patient = True
        if trainer.is_finished:  # a run that had come to its end is resumed
            return

        compiled_models = []
        if cfg.compile:
            compiled_models = [target.model for target in trainer.method.targets]
        blocks = Blocks(compiled_models)
        for batches in trainer.micro_batches():
            with blocks.step(trainer.step + 1):
                values = trainer.train_step(batches)
            bar.step(values)
            # Trackers plot numbers; the digest and the dynamics are for the run's own log.
            numbers = {name: value for name, value in values.items() if isinstance(value, float)}
            trainer.accelerator.log(numbers, step=trainer.step)
            if log is not None:
                log.metric(trainer.step, **values)
            if trainer.dynamics is not None:
                trainer.dynamics.write(folder)

            # A held-out loss can end the run, so `is_finished` is read again after it.
            if trainer.is_finished or is_due(trainer.step, cfg.validation_loss_steps):
                measure_heldout_loss(trainer, log, bar)
            if trainer.is_finished:
                has_samples = not cfg.skip_final_inference
            else:
                has_samples = is_due(trainer.step, trainer.validation_steps)
            if has_samples:
                validate(trainer, folder, log, bar)

            # A signal ends the run with a checkpoint of the step that it came in.
            is_stopping = trainer.stop_signal() is not None
            if is_stopping or is_due(trainer.step, cfg.checkpointing_steps):
                resume.save(trainer, folder, log)
            if is_stopping or trainer.is_finished:
                return


def is_due(step: int, interval: int | None) -> bool:
    """True at each multiple of an interval; never where it is 0 or None."""
    return interval is not None and interval > 0 and step % interval == 0


def measure_heldout_loss(trainer: Trainer, log: RunLog | None, bar: Bar) -> None:
    """Measure the loss on the validation set and log it.

    The main process measures; all processes get the value, so that they agree on the best step and
    on the end.
    """
    values: dict[str, float] = {}
    # The main process measures. If weights are split, each forward pass needs all processes.
    measures = log is not None or trainer.accelerator.is_fsdp2
    if measures and trainer.task.has_heldout:
        with bar.waiting_for("held-out samples"):
            values = trainer.task.heldout_loss(trainer.evaluating())
        log_measurement(trainer, log, trainer.step, values)
    value = values.get(trainer.cfg.heldout_measure)
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        (value,) = broadcast_object_list([value])
    trainer.outcome.note_measurement(value, trainer.step)


def validate(trainer: Trainer, folder: Path, log: RunLog | None, bar: Bar) -> None:
    """Sample images or answers of the validation set; the last ones with the final weights."""
    is_last = trainer.is_finished
    # With --keep_best the final weights are those of the best step, whose folder gets the samples.
    step = trainer.outcome.step(trainer.step) if is_last else trainer.step
    # As for the held-out loss; the files of processes other than the main one are deleted.
    if log is not None or trainer.accelerator.is_fsdp2:
        with (
            bar.waiting_for("validation"),
            torch.random.fork_rng(),
            tempfile.TemporaryDirectory() as temporary_folder,
        ):
            target_folder = folder if log is not None else Path(temporary_folder)
            evaluating = trainer.evaluating(final_weights=is_last)
            values = trainer.task.validate(step, target_folder, evaluating)
            if log is not None:
                images = sorted(validation_folder(folder, step).glob("*.png"))
                prompts = trainer.cfg.sampled_prompts
                show_images(trainer.accelerator.trackers, images, prompts, trainer.step)
        log_measurement(trainer, log, step, values)
    trainer.accelerator.wait_for_everyone()


def log_measurement(
    trainer: Trainer, log: RunLog | None, step: int, values: dict[str, float]
) -> None:
    """Log measurements of the weights of a step."""
    if values and log is not None:
        log.metric(step, **values)
        # Trackers refuse an earlier step than the last one, such as the best step at the end.
        trainer.accelerator.log(values, step=trainer.step)


def show_images(
    trackers: Sequence[Any], files: Sequence[Path], prompts: Sequence[str], step: int
) -> None:
    """Show validation images in TensorBoard and in Weights & Biases, as diffusers' scripts do.

    Args:
        trackers: trackers of accelerate.
        files: images; may be none.
        prompts: prompt of each image.
        step: last step that the trackers know.
    """
    if not files:
        return
    # Trackers take RGB; a sampled image with transparency would have four channels.
    images = [Image.open(file).convert("RGB") for file in files]
    for tracker in trackers:
        if tracker.name == "tensorboard":
            arrays = [np.asarray(image)[None] for image in images]  # (1, height, width, 3)
            sizes = {image.size for image in images}
            batches = {}
            if len(sizes) == 1:
                batches["validation"] = np.concatenate(arrays)
            else:  # a batch has images of one size
                for number, array in enumerate(arrays):
                    batches[f"validation {number:03d}"] = array
            tracker.log_images(batches, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            captioned = []
            for image, prompt in zip(images, prompts, strict=True):
                captioned.append(wandb.Image(image, caption=prompt))
            tracker.log({"validation": captioned}, step=step)


def warn_of_zero_auxiliary(folder: Path) -> None:
    """Warn of a run that was plain LoRA, since the norm of its auxiliary was 0 in every step."""
    norms = [row["auxiliary_norm"] for row in read_metrics(folder) if "auxiliary_norm" in row]
    if norms and all(norm == 0 for norm in norms):
        logger.warning(
            "the auxiliary was 0 in every step of %s, so this run is plain LoRA: look at --rho,"
            " --auxiliary_learning_rate and the schedule of the learning rate",
            folder,
        )


@contextlib.contextmanager
def recorded(log: RunLog | None, folder: Path) -> Iterator[None]:
    """Within the context an error or a signal is written into the run's record and raised again.

    The traceback of an unexpected error is written to the run folder.

    Args:
        log: record of the main process; None in the others.
        folder: run folder.

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
            sentence = (
                f"the disk that holds {folder} is full: make room and go on with"
                " --resume_from_checkpoint auto"
            )
            _close(log, "failed", sentence)
            raise TrainingError(sentence) from error
        sentence = str(error)
        # The package's own errors have all facts in their sentence.
        if not isinstance(error, UserError | TrainingError):
            keep_trace(error, folder)
            sentence = unexpected(error)
        # A search goes on without a run that diverged; another error ends it.
        results = {"diverged": True} if isinstance(error, Diverged) else {}
        _close(log, "failed", sentence, **results)
        raise


def _close(log: RunLog | None, status: str, reason: str | None = None, **results: Any) -> None:
    """Close the record of a run; on a full disk it stays as it was."""
    with contextlib.suppress(OSError):
        if log is not None:
            log.close(status, reason, **results)
