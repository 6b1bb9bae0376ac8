"""The training loop, for every task and method: steps, and what falls due between them.

`run` is the loop; `trainer.Trainer.train_step` is its step; `Evaluations` measures held-out losses
and makes validation samples, for the run's record and for the trackers. The record also says what
ended a run.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from PIL import Image

from ..core.durable import disk_is_full
from ..core.errors import (
    TrainingError,
    UserError,
    describe_error,
    describe_trace,
    keep_trace,
)
from ..core.values import measure_title
from ..run.console import Bar
from ..run.record import image_file_name, read_metrics, validation_folder
from ..run.runlog import RunLog
from . import resume
from .engine import Blocks
from .trainer import Trainer

logger = logging.getLogger(__name__)


def run(
    trainer: Trainer, folder: Path, log: RunLog | None, export: Callable[[], None] | None = None
) -> list[Failure]:
    """Train to the end: steps, metrics, held-out loss, checkpoints, export and validation.

    What a failure could lose comes first: a checkpoint is saved before the validation samples of
    its step, and the result is exported before the last ones. An evaluation that fails is reported,
    and training goes on (`Evaluations`).

    An interruption ends the loop earlier, after a step that is saved.

    Args:
        trainer: Trainer that takes the steps.
        folder: run folder.
        log: record of the main process; the other processes have none.
        export: writes the result; None where nothing is exported.

    Returns:
        The evaluations that failed, the same in each process.
    """
    record_activity = None if log is None else log.record_activity
    # An error closes the bar, so that its sentence has a line of its own.
    with Bar(trainer.num_steps, trainer.step, trainer.method.name, record_activity) as bar:
        evaluations = Evaluations(trainer, folder, log, bar)
        is_resumed = trainer.step > 0
        # A run that had come to its end is resumed to be exported again.
        was_finished = trainer.is_finished
        if not is_resumed:
            with bar.waiting_for("starting values"):
                trainer.initialise()
            if trainer.dynamics is not None:
                trainer.dynamics.write(folder)
            evaluations.measure()
            if trainer.cfg.eval_on_start:
                evaluations.validate()
        # From here on there is something to save: a signal waits for the end of a step.
        trainer.interruption.patient = True
        if not trainer.is_finished:
            has_validation = is_resumed and is_due(trainer.step, trainer.validation_steps)
            if has_validation and not evaluations.has_samples():
                # The run ended between this step's checkpoint and its validation samples.
                evaluations.validate()
            take_steps(trainer, folder, log, bar, evaluations)
        if not trainer.is_finished:  # a signal came
            return []
        if export is not None:
            with bar.waiting_for("export"):
                export()
        has_samples = was_finished and evaluations.has_samples()
        if not trainer.cfg.skip_final_inference and not has_samples:
            evaluations.validate()
        failures = evaluations.failures
        if trainer.accelerator.num_processes > 1:
            (failures,) = broadcast_object_list([failures])
        return failures


def take_steps(
    trainer: Trainer, folder: Path, log: RunLog | None, bar: Bar, evaluations: Evaluations
) -> None:
    """Take steps, with all that falls due between them, until the run is finished or interrupted.

    The validation samples of the last step are not among it.
    """
    cfg = trainer.cfg
    compiled_models = []
    if cfg.compile:
        compiled_models = [target.model for target in trainer.method.targets]
    blocks = Blocks(compiled_models)
    for batches in trainer.micro_batches():
        with blocks.step(trainer.step + 1):
            values = trainer.train_step(batches)
        bar.step(values)
        # Trackers plot scalars; the hash and the dynamics are for the run's own log.
        scalars = {name: value for name, value in values.items() if isinstance(value, float)}
        trainer.accelerator.log(scalars, step=trainer.step)
        if log is not None:
            log.metric(trainer.step, **values)
        if trainer.dynamics is not None:
            trainer.dynamics.write(folder)

        # A measurement can end the run, so `is_finished` is read again after it. A checkpoint holds
        # the best measurement so far, so it is saved after it.
        if trainer.is_finished or is_due(trainer.step, cfg.validation_loss_steps):
            evaluations.measure()
        is_stopping = trainer.stop_signal() is not None
        is_saved = is_stopping or is_due(trainer.step, cfg.checkpointing_steps)
        if is_saved:
            resume.save(trainer, folder, log)
        if trainer.is_finished:
            return
        if is_due(trainer.step, trainer.validation_steps):
            evaluations.validate()
        # A signal ends the run with a checkpoint of the step that it came in, also while samples
        # were made.
        if trainer.stop_signal() is not None:
            if not is_saved:
                resume.save(trainer, folder, log)
            return


def is_due(step: int, interval: int | None) -> bool:
    """True at each multiple of an interval; never where it is 0 or None."""
    return interval is not None and interval > 0 and step % interval == 0


class Failure(NamedTuple):
    """An evaluation that failed."""

    step: int  # optimizer steps taken
    sentence: str


class Evaluations:
    """Measures held-out losses and makes validation samples between the steps of a run.

    A loss is measured at step 0 of a new run, every ``validation_loss_steps`` (0 for never) and at
    the end. Where the held-out samples decide what is exported, the default is a twentieth of
    ``max_train_steps``, or a fifth if each measurement generates samples.

    After the first step a failure must not lose what was trained: it is reported in one sentence,
    and the run goes on. It ends the run at step 0, where nothing is lost; on a full disk, where no
    later checkpoint could be saved; and where each forward pass needs all processes (FSDP2), since
    the others would wait for ever.

    Args:
        trainer: Trainer of the run.
        folder: run folder.
        log: record of the main process; the other processes have none.
        bar: progress bar.

    Attributes:
        failures: evaluations that failed, in order, in the processes that evaluate.
    """

    def __init__(self, trainer: Trainer, folder: Path, log: RunLog | None, bar: Bar) -> None:
        self._trainer = trainer
        self._folder = folder
        self._log = log
        self._bar = bar
        self.failures: list[Failure] = []
        # The main process evaluates. If weights are split, each forward pass needs all processes.
        self._is_active = log is not None or trainer.accelerator.is_fsdp2

    def measure(self) -> None:
        """Measure the loss on the held-out samples, log it and note it for the best step.

        All processes get the value, so that they agree on the best step and on the end.
        """
        trainer = self._trainer
        values: dict[str, float] | None = {}
        if self._is_active and trainer.task.has_heldout:
            values = self._attempt(
                measure_title(trainer.cfg.heldout_measure),
                lambda: trainer.task.heldout_loss(trainer.evaluating()),
                trainer.step,
            )
        has_failed = values is None
        value = None if values is None else values.get(trainer.cfg.heldout_measure)
        if trainer.accelerator.num_processes > 1:
            trainer.accelerator.wait_for_everyone()
            has_failed, value = broadcast_object_list([has_failed, value])
        # A failed measurement neither is the best nor counts against the patience.
        if not has_failed:
            trainer.outcome.note_measurement(value, trainer.step)

    def validate(self) -> None:
        """Sample images or answers of the validation set; the last ones with the final weights."""
        if self._is_active:
            self._attempt("validation", self._make_samples, self._sampled_step())
        self._trainer.accelerator.wait_for_everyone()

    def has_samples(self) -> bool:
        """Test that the validation samples of this step's weights were made."""
        has_samples = validation_folder(self._folder, self._sampled_step()).is_dir()
        if self._trainer.accelerator.num_processes > 1:
            (has_samples,) = broadcast_object_list([has_samples])
        return has_samples

    def _sampled_step(self) -> int:
        """Step of the weights that are sampled: with ``--keep_best`` at the end the best one."""
        trainer = self._trainer
        return trainer.outcome.step(trainer.step) if trainer.is_finished else trainer.step

    def _make_samples(self) -> dict[str, float]:
        """Write the validation samples, show images to the trackers, and return metrics."""
        trainer = self._trainer
        step = self._sampled_step()
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as temporary_folder:
            # The files of processes other than the main one are deleted.
            folder = self._folder if self._log is not None else Path(temporary_folder)
            evaluating = trainer.evaluating(final_weights=trainer.is_finished)
            values = trainer.task.validate(step, folder, evaluating)
        if self._log is not None:
            prompts = trainer.cfg.sampled_prompts
            # By name: a resumed run may make fewer images than the folder has.
            images_folder = validation_folder(self._folder, step)
            images = [images_folder / image_file_name(number) for number in range(len(prompts))]
            show_images(trainer.accelerator.trackers, images, prompts, trainer.step)
        return values

    def _attempt(
        self, name: str, evaluate: Callable[[], dict[str, float]], step: int
    ) -> dict[str, float] | None:
        """Evaluate and log the values, or report the error where the run can go on.

        Args:
            name: of the evaluation, for the bar and the sentence.
            evaluate: returns the values.
            step: step of the evaluated weights.

        Returns:
            The values; None after a reported error.
        """
        trainer = self._trainer
        try:
            with self._bar.waiting_for(name):
                values = evaluate()
                log_measurement(trainer, self._log, step, values)
            return values
        except Exception as error:
            if trainer.step == 0 or trainer.accelerator.is_fsdp2 or disk_is_full(error):
                raise
            sentence = describe_error(error).rstrip(".")
            place = ""  # of the trace, which the record does not name: it may be published
            if not isinstance(error, UserError | TrainingError):
                place = f"; {describe_trace(error, self._folder)}"
        # Here nothing refers to the error any more, whose frames held tensors.
        clear_device_cache(garbage_collection=True)
        failure = Failure(trainer.step, f"the {name} at step {trainer.step} failed: {sentence}")
        self.failures.append(failure)
        consequence = "training goes on"
        if trainer.is_finished:
            consequence = "the result is exported all the same"
        self._bar.show_error(f"{failure.sentence}{place}; {consequence}.")
        return None


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
def record_outcome(log: RunLog | None, folder: Path) -> Iterator[None]:
    """Context manager: writes an error or a signal into the run's record and raises it again.

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
                f"the disk that holds {folder} is full: make room and resume with"
                " --resume_from_checkpoint auto"
            )
            _close(log, "failed", sentence)
            raise TrainingError(sentence) from error
        sentence = describe_error(error)
        if not isinstance(error, UserError | TrainingError):
            keep_trace(error, folder)
        _close(log, "failed", sentence)
        raise


def _close(log: RunLog | None, status: str, reason: str | None = None) -> None:
    """Close the record of a run; on a full disk it stays as it was."""
    with contextlib.suppress(OSError):
        if log is not None:
            log.close(status, reason)
