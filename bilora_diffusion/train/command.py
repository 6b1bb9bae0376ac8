"""The command of a training script, from its configuration to its end.

With ``--compare`` it trains a control too: the run of the same command with another ``--method``.
Both see the same data, noise and first values, so that they differ in their method alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import adapters, methods
from ..config.options import NO_CONTROL
from ..config.resolving import collect_notes
from ..config.run import RunConfig
from ..core.errors import Interrupted, add_source
from ..run import console, hub, interruption
from ..run.data import record_content, require_same_content, summarize
from ..run.folder import guard, refuse_unusable
from ..run.lock import locked
from ..run.record import read_run
from . import dry_run, setup
from .engine import build_accelerator, free_memory
from .resume import holds_finished_run
from .setup import Config, Script, explain_setup_errors

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
    if cfg.compare != NO_CONTROL:
        configs.append(control_config(script, arguments, cfg))
    if cfg.dry_run:
        dry_run.run(script, configs)
        return

    # The folders are checked before anything is loaded, and locked until the end, so that no second
    # command writes into them.
    folders = [Path(run_cfg.output_dir) for run_cfg in configs]
    with ExitStack() as locks:
        locked_folders: list[Path] = []
        for folder in folders:
            refuse_unusable(folder)
            # A control's folder is made when the control begins, so that no empty one is seen.
            if folder == folders[0] or folder.exists():
                locks.enter_context(locked(folder))
                locked_folders.append(folder)
        runs = plan(configs)
        accelerator = build_accelerator(cfg)
        repo_ids = hub_repositories(runs)
        with explain_setup_errors(cfg.base_model):
            task: Any = script.build_task(cfg, accelerator)
        for run in runs:
            run.require_same_data(task)

        # Both runs share the models and the encoded data.
        stop: Interrupted | None = None
        stopped_folder = folders[0]
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
                stop = setup.run(
                    script,
                    task,
                    accelerator,
                    run.folder,
                    run.checkpoint_folder,
                    repo_ids.get(run.folder),
                )
                if has_next and stop is None:
                    setup.close_run(accelerator)
            if stop is not None:
                stopped_folder = run.folder
                break
            trained_folders.append(run.folder)

        if stop is None and accelerator.is_main_process and len(folders) > 1:
            logger.info(console.describe_comparison(folders, script.scorer))
        # In this order, since the end of training closes the process group (see `free_memory`).
        free_memory(accelerator)
        accelerator.end_training()
        # Raised last: a control is trained whether or not the run's last images could be made.
        if stop is None and accelerator.is_main_process:
            for folder in trained_folders:
                setup.require_evaluated(folder)
    if stop is not None:
        raise interruption.describe_interruption(
            stopped_folder,
            stop,
            # The command that resumes is shown only if the user has typed this one.
            arguments if argv is None else None,
            launch,
            cfg.overwrite_output_dir,
            control_folder=folders[1] if len(folders) > 1 else None,
        )


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


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs of a command.

    Attributes:
        cfg: its configuration.
        checkpoint_folder: checkpoint to resume from; None for a new run.
        is_finished: True if an earlier command has trained it to its end.
    """

    cfg: Any
    checkpoint_folder: Path | None
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.cfg.output_dir)

    def require_same_data(self, task: Any) -> None:
        """Refuse a finished run of other data, with which no run of the task can be compared.

        Raises:
            UserError: the data of the task are not those of the run.
        """
        if not self.is_finished:
            return
        content = record_content(task.training_content(), task.heldout_content())
        recorded_content = read_run(self.folder)["content"]
        require_same_content(
            recorded_content, summarize(content), depends_on_heldout=self.cfg.depends_on_heldout
        )


def plan(configs: Sequence[RunConfig]) -> list[PlannedRun]:
    """Plan the runs of a command by the content of their folders, which does not change here.

    Args:
        configs: configuration of the run, and that of its control if there is one.

    Raises:
        UserError: a folder has other content, or a checkpoint does not exist.
    """
    runs = []
    for cfg in configs:
        # A finished run without a control is resumed all the same, which exports it again.
        resumes = len(configs) > 1 and cfg.resume_from_checkpoint == "auto"
        if resumes and holds_finished_run(Path(cfg.output_dir), cfg):
            runs.append(PlannedRun(cfg, None, is_finished=True))
            continue
        checkpoint_folder = guard(
            Path(cfg.output_dir),
            cfg.resume_from_checkpoint,
            settings=cfg.resume_settings(),
            overwrite=cfg.overwrite_output_dir,
            exports_weights=methods.get(cfg.method).exports_weights,
        )
        runs.append(PlannedRun(cfg, checkpoint_folder))
    return runs


def control_config(script: Script[Any], argv: Sequence[str], cfg: RunConfig) -> Any:
    """Make the configuration of the control: that of the command line with the other method.

    An option that both methods read, such as a radius, is another quantity in each of them. So the
    control has its own default in place of a typed one, as with a recipe for another method.

    Args:
        script: script of the command.
        argv: the command line.
        cfg: configuration that it was read to.

    Raises:
        UserError: the other method can't be trained with these options.
    """
    shared_options = methods.reads(cfg.method) & methods.reads(cfg.compare)
    typed_options = type(cfg).parser().explicit(argv)
    dropped_options = sorted(shared_options & typed_options.keys())
    # Of two equal flags the last one holds.
    words = without_flags(argv, dropped_options)
    words += ["--method", cfg.compare, "--compare", NO_CONTROL]
    words += ["--output_dir", str(control_folder(Path(cfg.output_dir), cfg.compare))]
    if cfg.hub_model_id:
        words += ["--hub_model_id", f"{cfg.hub_model_id}-{cfg.compare}"]

    with collect_notes() as known_notes:
        script.resolve(argv)
    with collect_notes() as notes, add_source(f"in the control run of --compare {cfg.compare}, "):
        control = script.resolve(words)
    for name in dropped_options:
        logger.warning(
            "--%s %s is for %s, so the control run takes the default of %s.",
            name,
            typed_options[name],
            cfg.method,
            cfg.compare,
        )
    # Notes for both runs were printed with the command line.
    for note in notes:
        if note not in known_notes:
            logger.warning("in the control run, %s", note)
    return control


def control_folder(folder: Path, method: str) -> Path:
    """The run folder of a control: that of the run, with the method after its name."""
    if folder.name in ("", ".."):  # a path such as "." has no name
        folder = folder.resolve()
    return Path(f"{folder}-{method}")


def without_flags(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Arguments of a command line without some options, each of which takes one value."""
    words: list[str] = []
    is_value = False  # of a flag that was left out
    for word in argv:
        flag, equals_sign, _ = word.partition("=")
        if is_value:
            is_value = False
        elif flag.startswith("--") and flag[2:].replace("-", "_") in names:
            is_value = not equals_sign
        else:
            words.append(word)
    return words
