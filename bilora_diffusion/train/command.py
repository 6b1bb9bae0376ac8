"""The command of a training script, from its configuration to its end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..methods import get
from ..run import console, interruption, lock, publish
from ..run.folder import guard, refuse_unusable
from ..run.interruption import Stop
from . import dry_run, setup
from .search import report
from .search.runs import Search
from .setup import Config, Script, build_accelerator, free_memory, translated_errors

logger = logging.getLogger(__name__)


def train(
    script: Script[Config], argv: Sequence[str] | None = None, config: Config | None = None
) -> None:
    """Train as the command line says and leave a run folder; with ``--fit`` after a search.

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
    if cfg.dry_run:
        dry_run.run(script, cfg, arguments)
        return

    # The folder is judged before anything is loaded, and locked until the end: no second command
    # may write into it.
    folder = Path(cfg.output_dir)
    refuse_unusable(folder)
    with lock.hold(folder):
        checkpoint_folder = guard(
            folder,
            cfg.resume_from_checkpoint,
            fit=cfg.fit,
            overwrite=cfg.overwrite_output_dir,
            exports_weights=get(cfg.method).exports_weights,
        )
        accelerator = build_accelerator(cfg)
        # A token without rights is found out now, not after hours of training.
        repo_id = None
        if cfg.push_to_hub:
            repo_id = publish.repository(cfg.hub_model_id or folder.name, cfg.hub_token)
        with translated_errors(cfg.base_model):
            task: Any = script.build_task(cfg, accelerator)

        # The runs of a search and the last one share the models and what is encoded of the data.
        search, stop = None, None
        if cfg.fit:
            search = Search(script, arguments, task, accelerator)
            choice = search.choose()
            if isinstance(choice, Stop):
                stop = choice
            else:
                task = task.with_config(choice)
        if stop is None:
            stop = setup.run(script, task, accelerator, folder, checkpoint_folder, repo_id=repo_id)
        # After the last run, whose options and time they tell.
        if search is not None and stop is None and accelerator.is_main_process:
            logger.info("\n".join(report.lines(folder, search.sample_noun)))
        # This order: the end of training takes the process group down (see `free_memory`).
        free_memory(accelerator)
        accelerator.end_training()
        if stop is not None:
            raise interruption.farewell(folder, stop, typed, cfg.overwrite_output_dir)
