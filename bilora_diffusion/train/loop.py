"""The only training loop: steps, and what falls due between them: log, validate, save, stop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..run.console import Bar
from ..run.runlog import RunLog
from .compiling import Blocks
from .recording import show_images
from .trainer import Trainer


def fit(trainer: Trainer, folder: Path, log: RunLog | None) -> None:
    """Train to the end: steps, metrics, held-out loss, validation images and checkpoints.

    An interruption ends it earlier, after a step that is saved.

    Args:
        log: the main process's record; the other processes have none.
    """
    doing = None if log is None else log.doing
    # The bar is closed on an error too, whose sentence then has a line of its own.
    with Bar(trainer.num_steps, trainer.step, trainer.method.name, doing) as bar:
        if trainer.step == 0:
            with bar.waiting_for("starting values"):
                trainer.initialise()
            if trainer.dynamics is not None:
                trainer.dynamics.write(folder)
            _heldout(trainer, log, bar)
            if trainer.cfg.eval_on_start:
                _validate(trainer, folder, log, bar)
        trainer.interruption.patient = True
        if trainer.finished:  # a resume of a run that had come to its end
            return
        targets = trainer.method.targets if trainer.cfg.compile else ()
        blocks = Blocks([target.model for target in targets])
        for batches in trainer.micro_batches():
            with blocks.step(trainer.step + 1):
                values = trainer.train_step(batches)
            bar.step(values)
            if _after_step(trainer, values, folder, log, bar):
                return


def _after_step(
    trainer: Trainer, values: dict[str, Any], folder: Path, log: RunLog | None, bar: Bar
) -> bool:
    """Write down what a step gave, and whatever falls due after it; True if the run ends here."""
    cfg = trainer.cfg
    numbers = {k: v for k, v in values.items() if isinstance(v, float)}
    trainer.accelerator.log(numbers, step=trainer.step)
    if log is not None:
        log.metric(trainer.step, **values)
    if trainer.dynamics is not None:
        trainer.dynamics.write(folder)
    if trainer.finished or _due(trainer.step, cfg.validation_loss_steps):
        _heldout(trainer, log, bar)
    last = trainer.finished and not cfg.skip_final_inference
    if last or _due(trainer.step, trainer.validation_steps):
        _validate(trainer, folder, log, bar)
    stops = trainer.asked_to_stop() is not None
    if stops or _due(trainer.step, cfg.checkpointing_steps):
        if log is not None:
            log.sync()
        trainer.save(folder)
    return stops or trainer.finished


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0  # pyright: ignore[reportOperatorIssue]


def _heldout(trainer: Trainer, log: RunLog | None, bar: Bar) -> None:
    """The loss on the validation set, written to the log by the main process, which computes it;
    where weights are split, every process does.
    """
    values = {}
    if log is not None or trainer.accelerator.is_fsdp2:
        with bar.waiting_for("held-out loss"):
            values = trainer.task.heldout_loss(trainer.evaluating())
        _measured(trainer, log, trainer.step, values)
    trainer.accelerator.wait_for_everyone()
    trainer.outcome.measured(values.get("heldout_loss"), trainer.step)


def _validate(trainer: Trainer, folder: Path, log: RunLog | None, bar: Bar) -> None:
    """Images or answers of the validation set, made by the main process; where weights are split,
    every process makes them, and what the others write is dropped. The last ones are of what the
    run leaves.
    """
    last = trainer.finished
    step = trainer.outcome.step(trainer.step) if last else trainer.step
    if log is not None or trainer.accelerator.is_fsdp2:
        with (
            bar.waiting_for("validation"),
            torch.random.fork_rng(),
            tempfile.TemporaryDirectory() as aside,
        ):
            kept = folder if log is not None else Path(aside)
            values = trainer.task.validate(step, kept, trainer.evaluating(result=last))
            if log is not None:
                show_images(trainer, kept, step)
        _measured(trainer, log, step, values)
    trainer.accelerator.wait_for_everyone()


def _measured(trainer: Trainer, log: RunLog | None, step: int, values: dict[str, float]) -> None:
    if values and log is not None:
        log.metric(step, **values)
        # Trackers take no step that is behind.
        trainer.accelerator.log(values, step=trainer.step)
