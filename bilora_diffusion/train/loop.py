"""The training loop for every task and method: its steps and the work between the steps.

`run` is the loop, and `trainer.Trainer.train_step` is its step. `Evaluations` measures held-out
losses and generates validation samples for the run's record and the trackers. The record also
contains the reason why a run ended.
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

    Results are saved before samples are generated, which may fail: a checkpoint before the
    validation samples of its step, and the exported result before the last samples. If an
    evaluation fails, the failure is reported and training continues, except in three cases
    (`Evaluations`).

    An interruption ends the loop early, after a step whose checkpoint is saved.

    Args:
        trainer: trainer that takes the steps.
        folder: run folder.
        log: record of the run in the main process; None in the other processes.
        export: function that writes the result; None if nothing is exported.

    Returns:
        The evaluations that failed, the same in every process; [] after an interruption.
    """
    record_activity = None if log is None else log.record_activity
    # An error closes the bar, so the error message starts on a new line.
    with Bar(trainer.num_steps, trainer.step, trainer.method.name, record_activity) as bar:
        evaluations = Evaluations(trainer, folder, log, bar)
        is_resumed = trainer.step > 0
        # A run that was already finished is resumed in order to export it again.
        was_finished = trainer.is_finished
        if not is_resumed:
            with bar.waiting_for("initial values"):
                trainer.initialise()
            if trainer.dynamics is not None:
                trainer.dynamics.write(folder)
            evaluations.measure()
            if trainer.cfg.eval_on_start:
                evaluations.validate()
        # From here on there is progress to save, so a signal takes effect at the end of a step.
        trainer.interruption.patient = True
        if not trainer.is_finished:
            has_validation = is_resumed and is_due(trainer.step, trainer.validation_steps)
            if has_validation and not evaluations.has_samples():
                # The run ended between this step's checkpoint and its validation samples.
                evaluations.validate()
            take_steps(trainer, folder, log, bar, evaluations)
        if not trainer.is_finished:  # a signal ended the steps
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
    """Take steps and do the work between them until the run is finished or interrupted.

    The validation samples of the last step are left to the caller.
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
        # Trackers plot scalars only; the hash and the dynamics go to the run's own log.
        scalars = {name: value for name, value in values.items() if isinstance(value, float)}
        trainer.accelerator.log(scalars, step=trainer.step)
        if log is not None:
            log.metric(trainer.step, **values)
        if trainer.dynamics is not None:
            trainer.dynamics.write(folder)

        # A measurement can end the run, so `is_finished` is read again afterwards. A checkpoint
        # contains the best measurement so far, so it is saved after the measurement.
        if trainer.is_finished or is_due(trainer.step, cfg.validation_loss_steps):
            evaluations.measure()
        is_stopping = trainer.stop_signal() is not None
        is_saved = is_stopping or is_due(trainer.step, cfg.checkpointing_steps)
        if is_saved:
            resume.save(trainer, folder, log)
        if trainer.is_finished:
            return
        # If the run is stopping, the resumed run generates these samples.
        if is_due(trainer.step, trainer.validation_steps) and not is_stopping:
            evaluations.validate()
        # A signal ends the run with a checkpoint of the current step, even if it arrives while
        # samples are generated.
        if trainer.stop_signal() is not None:
            if not is_saved:
                resume.save(trainer, folder, log)
            return


def is_due(step: int, interval: int | None) -> bool:
    """Return whether `step` is a multiple of `interval`; False if `interval` is 0 or None."""
    return interval is not None and interval > 0 and step % interval == 0


class Failure(NamedTuple):
    """An evaluation that failed."""

    step: int  # number of optimizer steps that were taken before it
    sentence: str


class Evaluations:
    """The evaluations between a run's steps: held-out losses and validation samples.

    The loss is measured at step 0 of a new run, every ``validation_loss_steps`` steps unless this
    option is 0, and at the end. If the held-out samples decide which weights are exported, the
    default interval is a twentieth of ``max_train_steps``, or a fifth if each measurement generates
    samples.

    After the first step, a failed evaluation must not lose trained weights: it is reported in one
    sentence, and the run continues. A failure ends the run only in three cases: at step 0, where
    nothing is lost; on a full disk, where no later checkpoint could be saved; and under FSDP2,
    where each forward pass needs all processes and the others would wait forever.

    Args:
        trainer: trainer of the run.
        folder: run folder.
        log: record of the run in the main process; None in the other processes.
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
        # Only the main process evaluates, unless the weights are split (FSDP2).
        self._is_active = log is not None or trainer.accelerator.is_fsdp2

    def measure(self) -> None:
        """Measure the loss on the held-out samples, log it, and update the best step.

        All processes get the value, so that they agree on the best step and on the end of the run.
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
        # A failed measurement can't be the best and does not count against the patience.
        if not has_failed:
            trainer.outcome.note_measurement(value, trainer.step)

    def validate(self) -> None:
        """Generate images or answers for the validation set, at the end with the final weights."""
        if self._is_active:
            self._attempt("validation", self._make_samples, self._sampled_step())
        self._trainer.accelerator.wait_for_everyone()

    def has_samples(self) -> bool:
        """Return whether there are validation samples of this step's weights."""
        has_samples = validation_folder(self._folder, self._sampled_step()).is_dir()
        if self._trainer.accelerator.num_processes > 1:
            (has_samples,) = broadcast_object_list([has_samples])
        return has_samples

    def _sampled_step(self) -> int:
        """Return the step of the sampled weights: at the end with ``--keep_best``, the best one."""
        trainer = self._trainer
        return trainer.outcome.step(trainer.step) if trainer.is_finished else trainer.step

    def _make_samples(self) -> dict[str, float]:
        """Write the validation samples, send images to the trackers, and return metrics."""
        trainer = self._trainer
        step = self._sampled_step()
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as temporary_folder:
            # Files of processes other than the main process are deleted.
            folder = self._folder if self._log is not None else Path(temporary_folder)
            evaluating = trainer.evaluating(final_weights=trainer.is_finished)
            values = trainer.task.validate(step, folder, evaluating)
        if self._log is not None:
            prompts = trainer.cfg.sampled_prompts
            # Use the names, since the folder may have more images than a resumed run generates.
            images_folder = validation_folder(self._folder, step)
            images = [images_folder / image_file_name(number) for number in range(len(prompts))]
            show_images(trainer.accelerator.trackers, images, prompts, trainer.step)
        return values

    def _attempt(
        self, name: str, evaluate: Callable[[], dict[str, float]], step: int
    ) -> dict[str, float] | None:
        """Evaluate and log the values, or report the error if the run can continue.

        Args:
            name: name of the evaluation, for the bar and the error message.
            evaluate: function that returns the values.
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
            place = ""  # where the trace is; not in the record, which may be published
            if not isinstance(error, UserError | TrainingError):
                place = f"; {describe_trace(error, self._folder)}"
        # The error is no longer referenced here, so the tensors in its frames can be freed.
        clear_device_cache(garbage_collection=True)
        failure = Failure(trainer.step, f"the {name} at step {trainer.step} failed: {sentence}")
        self.failures.append(failure)
        consequence = "training continues"
        if trainer.is_finished:
            consequence = "the result is still exported"
        self._bar.show_error(f"{failure.sentence}{place}; {consequence}.")
        return None


def log_measurement(
    trainer: Trainer, log: RunLog | None, step: int, values: dict[str, float]
) -> None:
    """Log measurements of a step's weights."""
    if values and log is not None:
        log.metric(step, **values)
        # Trackers refuse steps before the last one, such as the best step at the end.
        trainer.accelerator.log(values, step=trainer.step)


def show_images(
    trackers: Sequence[Any], files: Sequence[Path], prompts: Sequence[str], step: int
) -> None:
    """Show validation images in TensorBoard and in Weights & Biases, as diffusers' scripts do.

    Args:
        trackers: accelerate's trackers.
        files: image files; may be empty.
        prompts: prompt of each image.
        step: last step that was logged to the trackers.
    """
    if not files:
        return
    # Trackers expect RGB; a generated image with transparency would have four channels.
    images = [Image.open(file).convert("RGB") for file in files]
    for tracker in trackers:
        if tracker.name == "tensorboard":
            arrays = [np.asarray(image)[None] for image in images]  # (1, height, width, 3)
            sizes = {image.size for image in images}
            batches = {}
            if len(sizes) == 1:
                batches["validation"] = np.concatenate(arrays)
            else:  # the images of a batch must have the same size
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
    """Warn if a run was plain LoRA because the norm of its auxiliary was 0 in every step."""
    norms = [row["auxiliary_norm"] for row in read_metrics(folder) if "auxiliary_norm" in row]
    if norms and all(norm == 0 for norm in norms):
        logger.warning(
            "the auxiliary was 0 in every step of %s, so this run is plain LoRA: check --rho,"
            " --auxiliary_learning_rate and the learning-rate schedule",
            folder,
        )


@contextlib.contextmanager
def record_outcome(log: RunLog | None, folder: Path) -> Iterator[None]:
    """Write an error or a signal within the context to the run's record, and raise it again.

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
                f"the disk that holds {folder} is full: free some space and resume with"
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
    """Close the record of a run; if the disk is full, the record does not change."""
    with contextlib.suppress(OSError):
        if log is not None:
            log.close(status, reason)
