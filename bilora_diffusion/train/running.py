"""Everything that training scripts do around the loop: engine, record, end; and how they fail.

A script is its parser and three functions; ``main`` does the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from .. import adapters
from ..config.run import RunConfig
from ..core.errors import UserError, translated
from ..methods import for_run, get
from ..run import checkpoint, console, interruption, lock, publish, runlog
from ..run.content import summarize
from ..run.folder import FIT_RECORD, clear, guard, refuse_unusable
from ..run.interruption import Stop
from ..run.record import last_measured, read_fit
from . import dry_run, sharding
from .loop import fit
from .recording import announce, recorded, warn_of_zero_auxiliary
from .search import report
from .search.runs import Fit
from .stepping import Schedule, total_steps
from .task import Task
from .trainer import UNSUITED, Trainer

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
Config = TypeVar("Config", bound=RunConfig)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Script(Generic[Config]):
    """A training script."""

    project: str  # its name for trackers
    resolve: Callable[[Sequence[str] | None], Config]
    build_task: Callable[[Config, Accelerator], Task]
    # Writes what was trained into the run folder and reads it back; returns what that showed.
    export: Callable[[Config, Trainer, Path], dict[str, Any]]
    # Writes the model card, of results and of a hub repository, if any.
    card: Callable[[Config, Path, dict[str, Any], str | None], None]
    scores: str  # the module that scores its runs
    files: Callable[[Path], dict[str, str]]  # uses of files that a run leaves -> their names
    moments: Callable[[Any, torch.device], dry_run.Moments]  # what a dry run of the task takes


def main(
    script: Script[Config], argv: Sequence[str] | None = None, config: Config | None = None
) -> None:
    """Train as the command line, or the ``config`` it was read to, says and leave a run folder.

    Raises:
        UserError: bad input; nothing was written.
        TrainingError: training could not go on; checkpoints and metrics are kept.
        Interrupted: a signal ended it; it says how to go on.
    """
    typed = sys.argv[1:] if argv is None else None
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    console.quiet()
    cfg = script.resolve(argv) if config is None else config
    flags = sys.argv[1:] if argv is None else argv
    if cfg.dry_run:
        accelerator = build_accelerator(cfg)
        search = _prepare_search(script, flags, accelerator)
        dry_run.main(script.build_task, script.moments, cfg, accelerator, search)
        return
    folder = Path(cfg.output_dir)
    refuse_unusable(folder)
    with lock.hold(folder):
        stop = _train(script, cfg, folder, flags)
        if stop is not None:
            raise interruption.farewell(folder, stop, typed, cfg.overwrite_output_dir)


def _prepare_search(
    script: Script[Any], argv: Sequence[str], accelerator: Accelerator
) -> Callable[[Any], Fit]:
    """A function that makes the search of ``--fit`` for a task."""
    train = functools.partial(_run_of_fit, script)
    return functools.partial(Fit, script, argv, train=train, accelerator=accelerator)


def _train(script: Script[Config], cfg: Config, folder: Path, argv: Sequence[str]) -> Stop | None:
    """Train in a folder that is locked; returns what stopped it, if anything did."""
    resume = guard(
        folder,
        cfg.resume_from_checkpoint,
        fit=cfg.fit,
        overwrite=cfg.overwrite_output_dir,
        exports_weights=get(cfg.method).exports_weights,
    )
    accelerator = build_accelerator(cfg)
    repo_id = None
    if cfg.push_to_hub:
        repo_id = publish.repository(cfg.hub_model_id or folder.name, cfg.hub_token)
    with _training(cfg.base_model):
        task: Any = script.build_task(cfg, accelerator)
    stop, what = None, ""
    if cfg.fit:
        fit = _prepare_search(script, argv, accelerator)(task)
        chosen, what = fit.choose(), fit.what
        if isinstance(chosen, Stop):
            stop = chosen
        else:
            task = task.again(chosen)
    if stop is None:
        stop = _run(script, task, accelerator, folder, resume, repo_id=repo_id)
    if cfg.fit and stop is None and accelerator.is_main_process:
        logger.info("\n".join(report.lines(folder, what)))
    # DDP's reducer must be gone before the process group is taken down: the other way round, its
    # end waits for the group's thread while that waits for the interpreter.
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return stop


def _training(model: str) -> AbstractContextManager[None]:
    """A context in which an error of a library says that a model can't be trained as asked."""
    return translated(f'"{model}" can\'t be trained so', UNSUITED)


def _run_of_fit(script: Script[Config], task: Any, folder: Path, last_step: int) -> Stop | None:
    """Bring one run of a search to a step, and give the models back as they were."""
    accelerator = build_accelerator(task.cfg)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.hold(folder))
        for target in task.targets():
            stack.enter_context(adapters.restored(target.model, target.spec))
        stop = _run(script, task, accelerator, folder, checkpoint.latest(folder), last_step)
        accelerator.free_memory()
        gc.collect()
    return stop


def _run(
    script: Script[Config],
    task: Any,
    accelerator: Accelerator,
    folder: Path,
    resume: Path | None,
    last_step: int | None = None,
    repo_id: str | None = None,
) -> Stop | None:
    """Train and finish; nothing of it is alive when this returns what stopped it, if anything did.

    Args:
        last_step: where a run of a search ends, which exports nothing.
        repo_id: hub repository the folder goes to.
    """
    cfg = task.cfg
    with _training(cfg.base_model):
        steps = total_steps(cfg, task.num_samples, Schedule.of(cfg, accelerator).step_size)
        method = for_run(vars(cfg), steps, task.sample_names)
        trainer = Trainer(task, method, cfg, accelerator, last_step)
        if resume is None:
            trainer.probe()
    if resume is not None:
        trainer.load(resume)
        if last_step is None:
            logger.info("resuming from %s", resume)
    log = None
    if accelerator.is_main_process:
        if resume is None:
            # The last run of a search begins beside it: `Fit.choose` has overwritten what it may.
            clear(folder, overwrite=cfg.overwrite_output_dir and not cfg.fit)
        log = runlog.RunLog(folder, accelerator.device)
        resumed, steps = trainer.step if resume else None, trainer.last_step
        content = summarize(trainer.content)
        log.start(cfg.to_dict(), cfg.method, cfg.seed, resumed, num_steps=steps, content=content)
        if last_step is None:
            announce(trainer, folder)
    try:
        with trainer.interruption, recorded(log, folder):
            kinds = int | float | str  # that every tracker can show
            values = {k: v if isinstance(v, kinds) else repr(v) for k, v in cfg.to_dict().items()}
            accelerator.init_trackers(script.project, config=values)
            fit(trainer, folder, log)
            if not trainer.finished:
                raise KeyboardInterrupt
            results = {} if log is None else _results(trainer, folder)
            if last_step is None and log is not None:
                results |= _export(script, trainer, folder, log, results, repo_id)
            elif last_step and checkpoint.steps(folder)[-1:] != [trainer.step]:  # to go on from
                if log is not None:
                    log.sync()
                trainer.save(folder)
            accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        number = trainer.asked_to_stop() or trainer.interruption.number or signal.SIGINT
        return Stop(number, trainer.step, trainer.last_step)
    if log is not None:
        log.close("finished", **results)
        warn_of_zero_auxiliary(folder)
        if last_step is None:
            logger.info(console.closing(folder, script.files(folder), script.scores))
    late = trainer.interruption.number  # too late to stop the run, but not what comes after it
    return None if late is None else Stop(late, trainer.last_step, trainer.last_step)


def build_accelerator(cfg: RunConfig) -> Accelerator:
    """accelerate's engine in the wanted precision.

    Raises:
        UserError: the device can't compute in it.
    """
    # A text encoder's last layers may be left out of the loss. No buffer changes.
    distributed = DistributedDataParallelKwargs(
        find_unused_parameters=cfg.leaves_unused, broadcast_buffers=False
    )
    # What one process does alone, drawing or a run of a search, the others wait for.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))
    logs = str(Path(cfg.output_dir, cfg.logging_dir))
    project = ProjectConfiguration(project_dir=cfg.output_dir, logging_dir=logs)
    try:
        accelerator = Accelerator(
            mixed_precision=cfg.mixed_precision,
            log_with=None if cfg.report_to == "none" else cfg.report_to,
            project_config=project,
            kwargs_handlers=[distributed, waiting],
        )
    except ValueError as error:
        raise UserError(
            f"--mixed_precision {cfg.mixed_precision} does not work here ({error}): use bf16 or no."
        ) from error
    sharding.read_in_every_process(accelerator)
    if cfg.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    keep_freed_memory(accelerator.device)
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU let glibc keep up to 2 GiB of what is freed. By default it gives large blocks back
    to the kernel, which clears every page anew when the next step asks for it.
    """
    libc: Any = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(option, size)


def _results(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The steps of a run, and what was measured last of the weights it leaves."""
    measured = last_measured(folder, trainer.outcome.step(trainer.step))
    last = {name: value for name, (_, value) in measured.items()}
    return {"steps": trainer.step, **trainer.outcome.results(), **last}


def _export(
    script: Script[Any],
    trainer: Trainer,
    folder: Path,
    log: runlog.RunLog,
    measured: dict[str, Any],
    repo_id: str | None,
) -> dict[str, Any]:
    """Export the primary, prove it from the file and write the model card; returns what to add to
    the results.
    """
    cfg = trainer.cfg
    record = read_fit(folder / FIT_RECORD) if cfg.fit else None
    results: dict[str, Any] = {}
    if record and record["choice"]:
        results["chosen_steps"] = record["choice"]["steps"]
    log.writes_card()
    with trainer.outcome.applied():
        results["export"] = script.export(cfg, trainer, folder)
    script.card(cfg, folder, measured | results, repo_id)
    if repo_id is not None:
        publish.push(folder, repo_id, cfg.hub_token)
    return results
