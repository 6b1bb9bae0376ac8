"""One training run, from a task to the files that it leaves: record, loop, export.

A training script is a subclass of `Script`; `command.train` runs it.
"""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator

from ..config.run import RunConfig
from ..core.errors import translated
from ..core.files import counted
from ..methods import Method, for_run
from ..run import checkpoint, console, hub, provenance
from ..run.data import summarize
from ..run.folder import FIT_RECORD, clear
from ..run.interruption import Stop
from ..run.record import last_measured, read_search
from ..run.runlog import RunLog
from . import loop, resume
from .loop import recorded, warn_of_zero_auxiliary
from .optimizers import StepLayout, total_steps
from .task import Task
from .trainer import UNSUITED, Trainer

Config = TypeVar("Config", bound=RunConfig)
logger = logging.getLogger(__name__)


class Script(ABC, Generic[Config]):
    """What a training script adds to the shared command: its configuration, task and files."""

    project: ClassVar[str]  # its name for trackers
    scorer: ClassVar[str]  # the module that scores its runs

    @abstractmethod
    def resolve(self, argv: Sequence[str] | None) -> Config:
        """Make the configuration of a command line; None is the process's own."""

    @abstractmethod
    def build_task(self, cfg: Config, accelerator: Accelerator) -> Task:
        """Open the data and load the models, without weights where `cfg.dry_run` says so."""

    @abstractmethod
    def memory_by_phase(self, task: Any, device: torch.device) -> dict[str, dict[str, int]]:
        """Bytes that a task takes in each phase of a run (`dry_run.PhaseMemory`)."""

    @abstractmethod
    def export(self, cfg: Config, trainer: Trainer, folder: Path) -> dict[str, Any]:
        """Write the trained weights as they are now, read them back, return what that showed."""

    @abstractmethod
    def write_card(
        self, cfg: Config, folder: Path, results: dict[str, Any], repo_id: str | None
    ) -> None:
        """Write the model card of a run folder, which may go to a hub repository."""

    @abstractmethod
    def file_names(self, folder: Path) -> dict[str, str]:
        """Purposes of the files that a run may leave, and their names."""


def run(
    script: Script[Any],
    task: Task,
    accelerator: Accelerator,
    folder: Path,
    checkpoint_folder: Path | None,
    last_step: int | None = None,
    repo_id: str | None = None,
) -> Stop | None:
    """Train a task in a folder that is locked, and finish; nothing of it is alive afterwards.

    Args:
        script: Script of the task.
        task: What is trained.
        accelerator: Engine of the run.
        folder: Run folder.
        checkpoint_folder: Checkpoint to go on from; None for a new run.
        last_step: Where a run of a search ends, which exports nothing.
        repo_id: Hub repository that the folder goes to.

    Returns:
        What stopped the run, or came too late to stop it; None for neither.
    """
    cfg = task.cfg
    is_search_run = last_step is not None
    with translated_errors(cfg.base_model):
        step_size = StepLayout.from_config(cfg, accelerator).step_size
        num_steps = total_steps(cfg, task.num_samples, step_size)
        method = for_run(vars(cfg), num_steps, task.sample_names)
        trainer = Trainer(task, method, cfg, accelerator, last_step)
        # A checkpoint proves that the model can be trained.
        if checkpoint_folder is None:
            trainer.probe()
    if checkpoint_folder is not None:
        resume.load(trainer, checkpoint_folder)
        if not is_search_run:
            logger.info("resuming from %s", checkpoint_folder)

    log = None
    if accelerator.is_main_process:
        log = start_log(trainer, folder, is_resumed=checkpoint_folder is not None)
        if not is_search_run:
            announce(trainer, folder)

    try:
        with trainer.interruption, recorded(log, folder):
            accelerator.init_trackers(script.project, config=tracker_config(cfg))
            loop.run(trainer, folder, log)
            # A signal ended the loop between two steps, which the record notes like one within.
            if not trainer.is_finished:
                raise KeyboardInterrupt
            results = {} if log is None else measured_results(trainer, folder)
            if not is_search_run:
                if log is not None:
                    results |= export(script, trainer, folder, log, results, repo_id)
            elif checkpoint.steps(folder)[-1:] != [trainer.step]:
                # The search may bring this run to more steps later.
                resume.save(trainer, folder, log)
            # No process may take the group down while another still writes or measures.
            accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        number = trainer.stop_signal() or trainer.interruption.number or signal.SIGINT
        return Stop(number, trainer.step, trainer.last_step)
    if log is not None:
        log.close("finished", **results)
        warn_of_zero_auxiliary(folder)
        if not is_search_run:
            logger.info(console.closing(folder, script.file_names(folder), script.scorer))
    # A signal during the export: too late to stop the run, but not what comes after it.
    number = trainer.interruption.number
    if number is None:
        return None
    return Stop(number, trainer.last_step, trainer.last_step)


def start_log(trainer: Trainer, folder: Path, is_resumed: bool) -> RunLog:
    """Begin or go on with the record of a run; a new run deletes what it may overwrite."""
    cfg = trainer.cfg
    if not is_resumed:
        # With --fit the search has replaced what was in the folder, and stays beside the run.
        clear(folder, overwrite=cfg.overwrite_output_dir and not cfg.fit)
    log = RunLog(folder, trainer.accelerator.device)
    log.start(
        cfg.to_dict(),
        cfg.method,
        cfg.seed,
        trainer.step if is_resumed else None,
        num_steps=trainer.last_step,
        content=summarize(trainer.content),
    )
    return log


def translated_errors(model: str) -> Any:
    """A context in which a library's error says that a model can't be trained as asked."""
    return translated(f'"{model}" can\'t be trained so', UNSUITED)


def tracker_config(cfg: RunConfig) -> dict[str, Any]:
    """The options as values that every tracker can show."""
    values = {}
    for name, value in cfg.to_dict().items():
        values[name] = value if isinstance(value, int | float | str) else repr(value)
    return values


def announce(trainer: Trainer, folder: Path) -> None:
    """Say what is about to be trained on what, for how long, where, and where to."""
    cfg, steps, step_size = trainer.cfg, trainer.last_step, trainer.layout.step_size
    epochs = steps * step_size / trainer.task.num_samples
    processes, device = trainer.accelerator.num_processes, trainer.accelerator.device
    device_name = provenance.device(device)["name"]
    place = f"{processes} processes on {device_name}" if processes > 1 else device_name
    facts = [
        trainer.task.data_summary(),
        f"{counted(f'{steps:,}', 'step')} of {step_size} ({counted(f'{epochs:.3g}', 'epoch')})",
        describe_method(trainer.method, cfg.rank),
        f"{place}, {cfg.mixed_precision.replace('no', 'fp32')}",
    ]
    if trainer.step:
        facts.append(f"from step {trainer.step}")
    facts.append(f"into {folder}")
    logger.info("; ".join(facts))


def describe_method(method: Method, rank: int) -> str:
    """The method and the size of what it trains, for a sentence."""
    count = sum(parameter.numel() for parameter in method.clip_parameters())
    size = f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    if method.exports_weights:
        return f"{method.title} of {size} weights"
    layers = len(method.layers)
    return f"{method.title} of rank {rank} on {layers:,} layers ({size} parameters)"


def measured_results(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The steps of a run, and what was measured last of the weights that it leaves."""
    results = {"steps": trainer.step, **trainer.outcome.results()}
    measurements = last_measured(folder, trainer.outcome.step(trainer.step))
    for name, (_, value) in measurements.items():
        results[name] = value
    return results


def export(
    script: Script[Any],
    trainer: Trainer,
    folder: Path,
    log: RunLog,
    measured: dict[str, Any],
    repo_id: str | None,
) -> dict[str, Any]:
    """Export the primary, prove it from the file and write the model card.

    Returns:
        What to add to the measured results.
    """
    cfg = trainer.cfg
    record = read_search(folder / FIT_RECORD) if cfg.fit else None
    results: dict[str, Any] = {}
    if record and record["choice"]:
        results["chosen_steps"] = record["choice"]["steps"]
    log.writes_card()
    # The best or averaged weights, where the run leaves these.
    with trainer.outcome.applied():
        results["export"] = script.export(cfg, trainer, folder)
    script.write_card(cfg, folder, measured | results, repo_id)
    if repo_id is not None:
        hub.push(folder, repo_id, cfg.hub_token)
    return results
