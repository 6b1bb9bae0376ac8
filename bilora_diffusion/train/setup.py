"""One training run, from a task to its files: record, loop, export.

A training script is a subclass of `Script`; `command.train` runs it.
"""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator

from ..config.run import RunConfig
from ..core.errors import LIBRARY_ERRORS, Interrupted, TrainingError, as_user_error
from ..core.files import counted
from ..methods import Method, for_run
from ..run import console, hub, provenance
from ..run.data import summarize
from ..run.folder import clear, rewind
from ..run.record import last_measured, read_run
from ..run.runlog import RunLog
from . import loop, resume
from .engine import free_memory
from .loop import record_outcome, warn_of_zero_auxiliary
from .optimizers import StepLayout, total_steps
from .task import Task
from .trainer import Trainer

Config = TypeVar("Config", bound=RunConfig)
logger = logging.getLogger(__name__)


class Script(ABC, Generic[Config]):
    """A training script: the parts of the shared command that differ between images and text."""

    config_class: ClassVar[Any]  # class of `Config`; its `resolve` reads a command line
    project: ClassVar[str]  # project name in trackers
    scorer: ClassVar[str]  # name of the module that scores the script's runs

    def resolve(self, argv: Sequence[str] | None) -> Config:
        """Create the configuration from ``argv``, or from the process's arguments if it is None."""
        return self.config_class.resolve(argv)

    @abstractmethod
    def build_task(self, cfg: Config, accelerator: Accelerator) -> Task:
        """Open the data and load the models; for a dry run, build the models without weights."""

    @abstractmethod
    def memory_by_phase(self, task: Any, device: torch.device) -> dict[str, dict[str, int]]:
        """Return the bytes that a task takes in each phase of a run (`dry_run.PhaseMemory`)."""

    def write_contact_sheet(self, trainer: Trainer, folder: Path) -> None:
        """Write an overview of training images to a new run's folder; text has no overview."""

    def cpu_bytes(self, task: Any, device: torch.device) -> dict[str, int]:
        """Return the bytes that a task keeps on the CPU if it trains on another device, by part."""
        return {}

    @abstractmethod
    def export(self, cfg: Config, trainer: Trainer, folder: Path) -> dict[str, Any]:
        """Write the current weights, read them back, and return facts about the file."""

    @abstractmethod
    def write_card(
        self, cfg: Config, folder: Path, results: dict[str, Any], repo_id: str | None
    ) -> None:
        """Write a run's model card; ``repo_id`` is the hub repository that the folder goes to."""

    @abstractmethod
    def file_names(self, folder: Path) -> dict[str, str]:
        """Return the names of files that a run may write, by purpose."""


def run(
    script: Script[Any],
    task: Task,
    accelerator: Accelerator,
    folder: Path,
    checkpoint_folder: Path | None,
    repo_id: str | None = None,
) -> None:
    """Train a task in a folder that is already locked, and export the result.

    Args:
        script: training script.
        task: task to train.
        accelerator: engine of the run.
        folder: run folder.
        checkpoint_folder: checkpoint to resume from; None for a new run.
        repo_id: hub repository that the folder is pushed to.

    Raises:
        UserError: the task can't be trained with these options, or the checkpoint does not match
            the run.
        TrainingError: training could not continue.
        Interrupted: a signal ended the run, or came during the export: then the run is finished,
            but the command must not start the next one.
    """
    cfg = task.cfg
    with explain_setup_errors(cfg.base_model):
        step_size = StepLayout.from_config(cfg, accelerator).step_size
        num_steps = total_steps(cfg, task.num_samples, step_size)
        method = for_run(vars(cfg), num_steps)
        trainer = Trainer(task, method, cfg, accelerator)
        # A resumed run has already completed training steps, so it skips the probe.
        if checkpoint_folder is None:
            trainer.probe()
    if checkpoint_folder is not None:
        resume.load(trainer, checkpoint_folder)
        logger.info("resuming from %s", checkpoint_folder)

    log = None
    if accelerator.is_main_process:
        log = start_log(trainer, folder, is_resumed=checkpoint_folder is not None)
        announce(trainer, folder)
        if checkpoint_folder is None:
            script.write_contact_sheet(trainer, folder)

    try:
        with trainer.interruption, record_outcome(log, folder):
            accelerator.init_trackers(script.project, config=tracker_config(cfg))
            exported: dict[str, Any] = {}

            def export() -> None:
                # Export the weights of the best step if the run keeps them.
                with trainer.outcome.applied():
                    exported["export"] = script.export(cfg, trainer, folder)

            failures = loop.run(trainer, folder, log, None if log is None else export)
            # A signal that stopped the loop between steps is also recorded as an interruption, as
            # if it had arrived during a step.
            if not trainer.is_finished:
                raise Interrupted
            results = {} if log is None else measured_results(trainer, folder)
            if failures:
                results["failed_evaluations"] = [failure._asdict() for failure in failures]
            if log is not None:
                results |= exported
                log.record_card()
                script.write_card(cfg, folder, results, repo_id)
            # No process may close the process group while another one is still working.
            accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        number = trainer.stop_signal() or trainer.interruption.number or signal.SIGINT
        message = f"interrupted at step {trainer.step} of {trainer.num_steps}"
        raise Interrupted(message, number, folder) from None
    if log is not None:
        log.close("finished", **results)
        warn_of_zero_auxiliary(folder)
        logger.info(console.describe_run(folder, script.file_names(folder), script.scorer))
        # Push last, so that the uploaded record is complete and a failed upload loses nothing.
        if repo_id is not None:
            hub.push(folder, repo_id, cfg.hub_token)
    # A signal during the export comes too late for this run, but stops the runs after it.
    number = trainer.interruption.number
    if number is not None:
        message = f"interrupted after the run in {folder} had finished"
        raise Interrupted(message, number, folder)


def close_run(accelerator: Accelerator) -> None:
    """Close a run's trackers and free its memory before the next run of the same process."""
    free_memory(accelerator)
    # `end_training` would also close the process group.
    for tracker in accelerator.trackers:
        tracker.finish()
    if torch.cuda.is_available():
        # The next run records its own peak.
        torch.cuda.reset_peak_memory_stats()


def require_evaluated(folder: Path) -> None:
    """Check that the last measurement and validation of a finished run succeeded.

    Raises:
        TrainingError: one of them failed; the files of the run are written.
    """
    results = read_run(folder)["results"]
    for failure in results.get("failed_evaluations", []):
        if failure["step"] == results["steps"]:
            raise TrainingError(
                f"the run in {folder} is trained and its files are written, but"
                f" {failure['sentence']}"
            )


def start_log(trainer: Trainer, folder: Path, is_resumed: bool) -> RunLog:
    """Start or continue a run's record; a new run first deletes the files that it replaces."""
    cfg = trainer.cfg
    if not is_resumed:
        clear(folder, overwrite=cfg.overwrite_output_dir)
    elif cfg.overwrite_output_dir:
        rewind(folder, trainer.step)
    log = RunLog(folder, trainer.accelerator.device)
    log.start(
        cfg.to_dict(),
        cfg.method,
        cfg.seed,
        trainer.step if is_resumed else None,
        num_steps=trainer.num_steps,
        content=summarize(trainer.content),
    )
    return log


def explain_setup_errors(model: str) -> AbstractContextManager[None]:
    """Return a context manager that turns a library's error during setup into one sentence."""
    return as_user_error(
        f'"{model}" can\'t be trained with these options',
        "change the option that caused the error, or give another model",
        LIBRARY_ERRORS,
    )


def tracker_config(cfg: RunConfig) -> dict[str, Any]:
    """Return the options as numbers and strings, which every tracker can show."""
    values = {}
    for name, value in cfg.to_dict().items():
        values[name] = value if isinstance(value, int | float | str) else repr(value)
    return values


def announce(trainer: Trainer, folder: Path) -> None:
    """Log the data, length, method, device, settings and folder of a run before it starts."""
    cfg = trainer.cfg
    steps, step_size = trainer.num_steps, trainer.layout.step_size
    epochs = steps * step_size / trainer.task.num_samples
    place = provenance.device(trainer.accelerator.device)["name"]
    processes = trainer.accelerator.num_processes
    if processes > 1:
        place = f"{processes} processes on {place}"
    facts = [
        trainer.task.data_summary(),
        f"{counted(f'{steps:,}', 'step')} of {counted(step_size, 'sample')}"
        f" ({counted(f'{epochs:.3g}', 'epoch')})",
        describe_method(trainer.method, cfg.rank),
        f"{place}, {cfg.mixed_precision.replace('no', 'fp32')}",
    ]
    # The origin of the settings that were not given.
    facts.append(f"recipe {cfg.config}" if cfg.config else "the paper's defaults")
    if trainer.step:
        facts.append(f"from step {trainer.step}")
    facts.append(f"into {folder}")
    logger.info("; ".join(facts))


def describe_method(method: Method, rank: int) -> str:
    """Return the method and the number of weights that it exports, as part of a sentence."""
    count = sum(parameter.numel() for parameter in method.result_parameters())
    size = f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    if method.exports_weights:
        return f"{method.title} of {size} weights"
    layers = len(method.layers)
    return f"{method.title} of rank {rank} on {layers:,} layers ({size} parameters)"


def measured_results(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Return the number of steps and the last measurements of the weights that a run exports."""
    results = {"steps": trainer.step, **trainer.outcome.results()}
    measurements = last_measured(folder, trainer.outcome.step(trainer.step))
    for name, (_, value) in measurements.items():
        results[name] = value
    return results
