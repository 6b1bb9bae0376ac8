"""The command of a training script, from its configuration to its end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import adapters
from ..config.options import NO_CONTROL
from ..run import console, hub, interruption
from ..run.folder import hold, refuse_unusable
from ..run.interruption import Stop
from . import comparison, dry_run, setup
from .comparison import PlannedRun
from .search import report
from .search.runs import Search
from .setup import Config, Script, build_accelerator, free_memory, translated_errors

logger = logging.getLogger(__name__)


def train(
    script: Script[Config], argv: Sequence[str] | None = None, config: Config | None = None
) -> None:
    """Train as the command line says and leave a run folder; with ``--fit`` after a search, with
    ``--compare`` and that of a control run.

    Args:
        script: Script whose models are trained.
        argv: Arguments; None for those of the process.
        config: Configuration that they were read to, if that was done.

    Raises:
        UserError: Bad input; nothing was written.
        TrainingError: Training could not go on; checkpoints and metrics are kept.
        Interrupted: A signal ended it; it says how to go on.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # Only what was typed can be typed once more: the farewell repeats it, with a resume.
    typed = arguments if argv is None else None
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    console.quiet()
    cfg = script.resolve(argv) if config is None else config
    configs: list[Any] = [cfg]
    if cfg.compare != NO_CONTROL:
        configs.append(comparison.control_config(script, arguments, cfg))
    if cfg.dry_run:
        dry_run.run(script, configs, arguments)
        return

    # The folders are judged before anything is loaded, and locked until the end: no second command
    # may write into them.
    folders = [Path(run_cfg.output_dir) for run_cfg in configs]
    control_folder = folders[1] if len(folders) > 1 else None
    with ExitStack() as locks:
        for folder in folders:
            refuse_unusable(folder)
            locks.enter_context(hold(folder))
        runs = comparison.plan(configs)
        accelerator = build_accelerator(cfg)
        # A token without rights is found out now, not after hours of training.
        repo_ids: dict[Path, str] = {}
        if cfg.push_to_hub:
            for run in runs:
                name = run.cfg.hub_model_id or run.folder.name
                repo_ids[run.folder] = hub.repository(name, cfg.hub_token)
        with translated_errors(cfg.base_model):
            task: Any = script.build_task(cfg, accelerator)
        for run in runs:
            run.require_same_data(task)

        # All runs share the models and what is encoded of the data.
        search, stop = None, None
        if cfg.fit:
            search = Search(script, arguments, task, accelerator)
            choice = search.choose()
            if isinstance(choice, Stop):
                stop = choice
            else:
                task = task.with_config(choice)
        stopped_folder = folders[0]
        for run in runs:
            if stop is not None:
                break
            if run.is_finished:
                logger.info("%s holds this run already, to its end", run.folder)
                continue
            if run is not runs[0]:
                accelerator = build_accelerator(run.cfg)
                task = task.with_config(run.cfg)
            is_last = run is runs[-1]
            stop = _train_run(
                script, task, accelerator, run, repo_ids.get(run.folder), restores=not is_last
            )
            stopped_folder = run.folder
        # After the last run, whose options and time they tell.
        if stop is None and accelerator.is_main_process:
            if search is not None:
                logger.info("\n".join(report.lines(folders[0], search.sample_noun)))
            if control_folder is not None:
                logger.info(console.compared(folders, script.scorer))
        # This order: the end of training takes the process group down (see `free_memory`).
        free_memory(accelerator)
        accelerator.end_training()
        if stop is not None:
            raise interruption.farewell(
                stopped_folder, stop, typed, cfg.overwrite_output_dir, control_folder
            )


def _train_run(
    script: Script[Any],
    task: Any,
    accelerator: Accelerator,
    run: PlannedRun,
    repo_id: str | None,
    *,
    restores: bool,
) -> Stop | None:
    """Train a run in its folder.

    Args:
        script: Script of the task.
        task: What is trained, with the configuration of the run.
        accelerator: Engine of the run.
        run: The run, which is not finished.
        repo_id: Hub repository that the folder goes to.
        restores: Whether to give the models back as they were, for the run that comes next.

    Returns:
        What stopped the run; None if nothing did.
    """
    with ExitStack() as restoring:
        if restores:
            for target in task.targets():
                restoring.enter_context(adapters.restored(target.model, target.spec))
        stop = setup.run(
            script, task, accelerator, run.folder, run.checkpoint_folder, repo_id=repo_id
        )
        if restores and stop is None:
            free_memory(accelerator)
            # Not by `end_training`, which takes the process group down too.
            for tracker in accelerator.trackers:
                tracker.finish()
            if torch.cuda.is_available():
                # The next run records a peak of its own.
                torch.cuda.reset_peak_memory_stats()
    return stop
