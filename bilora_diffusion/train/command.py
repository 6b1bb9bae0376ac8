"""The command of a training script, from its configuration to its end.

With ``--compare``, the command also trains a control, which has another ``--method`` and the
defaults of options that both methods read, but otherwise the same options. Both runs use the same
data, noise and initial values, so only the method differs.
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
    """Run the command line of a training script.

    With ``--compare``, a control run is also trained, into its own folder.

    Args:
        script: training script.
        argv: command-line arguments; None for those of the process.
        config: configuration that was already read from the arguments, if any.

    Raises:
        UserError: the input is invalid; most input is checked before anything is written.
        TrainingError: training could not continue, or the last evaluation failed; checkpoints and
            metrics are kept.
        Interrupted: a signal ended the command; the message says how to resume an unfinished run.
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
            # Show the command for resuming only if the user typed a command.
            arguments if argv is None else None,
            launch,
            cfg.overwrite_output_dir,
            control_folder=Path(configs[1].output_dir) if len(configs) > 1 else None,
        ) from None


def train_configs(script: Script[Any], configs: Sequence[Any], closing: str = "") -> None:
    """Train runs on the same data, one at a time; they share the models and the encoded data.

    Args:
        script: training script.
        configs: configuration of each run; only the method and its options, the output folder and
            the hub repository differ.
        closing: message that is logged after all runs.

    Raises:
        UserError: the input is invalid; most input is checked before anything is written.
        TrainingError: training could not continue, or the last evaluation of a run failed;
            checkpoints and metrics are kept.
        Interrupted: a signal ended a run; the runs after it were not started.
    """
    # Check the folders before anything is loaded, and lock them until the end, so that no other
    # command writes to them.
    folders = [Path(cfg.output_dir) for cfg in configs]
    with ExitStack() as locks:
        locked_folders: list[Path] = []
        for folder in folders:
            refuse_unusable(folder)
            # A later run's folder is created when that run starts, to avoid empty folders.
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
                logger.info("%s already contains this run, which is finished", run.folder)
                continue
            if run.folder not in locked_folders:
                locks.enter_context(locked(run.folder))
                (run,) = plan([run.cfg])  # another command may have used the folder meanwhile
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
        # Raise this error last, so the control is trained even if the run's last evaluation failed.
        if accelerator.is_main_process:
            for folder in trained_folders:
                setup.require_evaluated(folder)


def show_messages() -> None:
    """Show this package's messages, and the warnings and errors of libraries, on stderr."""

    def is_shown(record: logging.LogRecord) -> bool:
        # open_clip uses the root logger and logs the name of each file that it reads.
        return record.name.startswith(PACKAGE) or record.levelno >= logging.WARNING

    handler = logging.StreamHandler()
    handler.addFilter(is_shown)
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[handler])


def hub_repositories(runs: Sequence[PlannedRun]) -> dict[Path, str]:
    """Create the hub repositories that the runs are pushed to; return their ids by run folder.

    A token that can't create a missing repository is refused here rather than after hours of
    training.
    """
    repo_ids: dict[Path, str] = {}
    for run in runs:
        if run.cfg.push_to_hub:
            name = run.cfg.hub_model_id or run.folder.name
            repo_ids[run.folder] = hub.repository(name, run.cfg.hub_token)
    return repo_ids
