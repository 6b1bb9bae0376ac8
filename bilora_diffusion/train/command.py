"""The command of a training script, from its configuration to its end.

With ``--compare`` it trains a control too: the run of the same command with another ``--method``.
Both see the same data, noise and first values, so that they differ in their method alone.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import adapters
from ..config.options import NO_CONTROL
from ..core.errors import Interrupted
from ..run import console, hub, interruption
from ..run.folder import refuse_unusable
from ..run.lock import locked
from . import dry_run, setup
from .engine import build_accelerator, close_engine
from .setup import Config, Script, explain_setup_errors
from .variants import PlannedRun, control_config, plan

PACKAGE = __name__.partition(".")[0]
logger = logging.getLogger(__name__)


def train(
    script: Script[Config], argv: Sequence[str] | None = None, config: Config | None = None
) -> None:
    """Train by a command line into a run folder.

    With ``--compare`` a control run is trained too, into a folder of its own.

    Args:
        script: script of the command.
        argv: arguments; None for those of the process.
        config: configuration that they were read to, if that was done.

    Raises:
        UserError: bad input; nothing was written.
        TrainingError: training could not go on; checkpoints and metrics stay.
        Interrupted: a signal ended the command; the sentence says how to resume.
    """
    arguments = sys.argv[1:] if argv is None else argv
    show_messages()
    console.quiet()
    launch = interruption.find_launch(arguments)
    cfg = script.resolve(argv) if config is None else config
    configs: list[Any] = [cfg]
    closing = ""
    if cfg.compare != NO_CONTROL:
        configs.append(control_config(script, arguments, cfg))
        folders = [Path(run_cfg.output_dir) for run_cfg in configs]
        score = f"python -m {script.scorer} {shlex.join(map(str, folders))} base"
        closing = console.describe_comparison(folders, score)
    if cfg.dry_run:
        dry_run.run(script, configs)
        return
    try:
        train_configs(script, configs, closing)
    except Interrupted as stop:
        raise interruption.describe_interruption(
            stop,
            # The command that resumes is shown only if the user has typed this one.
            arguments if argv is None else None,
            launch,
            cfg.overwrite_output_dir,
            control_folder=Path(configs[1].output_dir) if len(configs) > 1 else None,
        ) from None


def train_configs(script: Script[Any], configs: Sequence[Any], closing: str = "") -> None:
    """Train runs on the same data one after another; they share the models and the encoded data.

    Args:
        script: script of the runs.
        configs: configuration of each run, which differ in the method and in the output folder.
        closing: message at the end of all runs.

    Raises:
        UserError: bad input; nothing was written.
        TrainingError: training could not go on; checkpoints and metrics stay.
        Interrupted: a signal ended a run, after which none began.
    """
    # The folders are checked before anything is loaded, and locked until the end, so that no second
    # command writes into them.
    folders = [Path(cfg.output_dir) for cfg in configs]
    with ExitStack() as locks:
        locked_folders: list[Path] = []
        for folder in folders:
            refuse_unusable(folder)
            # A later run's folder is made when the run begins, so that no empty one is seen.
            if folder == folders[0] or folder.exists():
                locks.enter_context(locked(folder))
                locked_folders.append(folder)
        runs = plan(configs)
        accelerator = build_accelerator(configs[0])
        repo_ids = hub_repositories(runs)
        with explain_setup_errors(configs[0].base_model):
            task: Any = script.build_task(configs[0], accelerator)
        for run in runs:
            run.require_same_data(task)

        trained_folders = []
        for number, planned_run in enumerate(runs):
            run = planned_run
            if run.is_finished:
                logger.info("%s has this run already, to its end", run.folder)
                continue
            if run.folder not in locked_folders:
                locks.enter_context(locked(run.folder))
                (run,) = plan([run.cfg])  # another command may have trained there meanwhile
            if number > 0:
                accelerator = build_accelerator(run.cfg)
                task = task.with_config(run.cfg)
            with ExitStack() as restoring:
                has_next = planned_run is not runs[-1]
                if has_next:  # the next run starts from the same models
                    for target in task.targets():
                        restoring.enter_context(adapters.restored(target.model, target.spec))
                try:
                    setup.run(
                        script,
                        task,
                        accelerator,
                        run.folder,
                        run.checkpoint_folder,
                        repo_ids.get(run.folder),
                    )
                except Interrupted:
                    close_engine(accelerator)
                    raise
                if has_next:
                    setup.close_run(accelerator)
            trained_folders.append(run.folder)

        if accelerator.is_main_process and closing:
            logger.info(closing)
        close_engine(accelerator)
        # Raised last: a control is trained whether or not the run's last images could be made.
        if accelerator.is_main_process:
            for folder in trained_folders:
                setup.require_evaluated(folder)


def show_messages() -> None:
    """Show the package's messages on stderr, and of the libraries only warnings."""

    def is_shown(record: logging.LogRecord) -> bool:
        # open_clip has no logger of its own, and names each file that it reads.
        return record.name.startswith(PACKAGE) or record.levelno >= logging.WARNING

    handler = logging.StreamHandler()
    handler.addFilter(is_shown)
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[handler])


def hub_repositories(runs: Sequence[PlannedRun]) -> dict[Path, str]:
    """Make the hub repositories that the runs' folders are pushed to; their ids by the folder.

    A token without write access is refused here, not after hours of training.
    """
    repo_ids: dict[Path, str] = {}
    for run in runs:
        if run.cfg.push_to_hub:
            name = run.cfg.hub_model_id or run.folder.name
            repo_ids[run.folder] = hub.repository(name, run.cfg.hub_token)
    return repo_ids
