"""A run of a search, which one process trains alone on models that all runs share."""

from __future__ import annotations

import gc
import logging
import math
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ... import adapters
from ...core.errors import Diverged
from ...core.values import part_prefix
from ...run import checkpoint
from ...run.folder import FIT
from ...run.interruption import Stop
from ...run.lock import locked
from ...run.record import RUN, read_metrics, read_run
from .. import engine, setup
from .halving import Curve, Trial
from .space import title

TOO_LARGE = "does not fit the memory of the device"
logger = logging.getLogger(__name__)


class SearchStopped(KeyboardInterrupt):
    """A signal has ended a run of a search; the argument is its `Stop`."""


class LoneProcess(Accelerator):
    """accelerate's engine for a run of one process, also if it is one of several.

    Processes share the runs of a search, so that within a run no process waits for another.
    """

    # Plain values in place of accelerate's properties, which read the process group.
    num_processes: Any = 1
    process_index: Any = 0
    local_process_index: Any = 0
    is_main_process: Any = True
    is_local_main_process: Any = True
    use_distributed: Any = False
    distributed_type: Any = DistributedType.NO

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return tensor

    def wait_for_everyone(self) -> None:
        pass


def train_trial(script: setup.Script[Any], task: Any, folder: Path, trial: Trial) -> Curve | str:
    """Train the run of a trial to its steps, and restore the models.

    Args:
        script: script of the search.
        task: task of the trial.
        folder: run folder of the trial; an earlier run in it is resumed.
        trial: candidate, fold and steps.

    Returns:
        Losses of the run, or the reason why it can't reach its steps.

    Raises:
        SearchStopped: a signal ended the run.
    """
    has_room = True
    try:
        # A run that diverged has the reason in its record, from which `read_curve` reads it.
        with suppress(Diverged):
            stop = _run(script, task, folder, trial.steps)
            if stop is not None:
                raise SearchStopped(stop._replace(run=f"{FIT}/{folder.name}"))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        has_room = False
    if not has_room:
        # Only here, after the `except` block, the error is deleted, whose frames have the run's
        # tensors.
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning("fit: %s %s, so it is left out", title(trial.candidate), TOO_LARGE)
        return TOO_LARGE
    curve = read_curve(folder, trial.steps, task.cfg.heldout_measure)
    assert curve is not None
    return curve


def _run(script: setup.Script[Any], task: Any, folder: Path, steps: int) -> Stop | None:
    """Train a run up to a step; returns the signal that stopped it, if any."""
    accelerator = engine.build_accelerator(task.cfg, LoneProcess)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        # The next run starts from the models as they were loaded.
        for target in task.targets():
            stack.enter_context(adapters.restored(target.model, target.spec))
        # A promoted candidate goes on from the checkpoint of the rung below.
        latest = checkpoint.latest(folder)
        stop = setup.run(script, task, accelerator, folder, latest, last_step=steps)
        engine.free_memory(accelerator)
    return stop


def is_out_of_memory(error: BaseException | None) -> bool:
    """Test that an error, or one that it was raised from, says that a device's memory is full."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


def read_curve(folder: Path, steps: int, measure: str) -> Curve | str | None:
    """A measure of a run up to a step, or why it can't reach it; None if not trained so far."""
    if max(checkpoint.steps(folder), default=0) >= steps:
        curve = {}
        for row in read_metrics(folder):
            losses = []
            for name, value in row.items():
                if name.startswith(part_prefix(measure)):
                    # JSON has null for a loss that is not finite.
                    losses.append(math.inf if value is None else value)
            # A resumed search reads runs that a later rung of the earlier one has continued.
            if losses and row["step"] <= steps:
                curve[row["step"]] = np.array(losses)
        return curve
    if not (folder / RUN).exists():
        return None
    record = read_run(folder)
    return record["error"] if record["results"].get("diverged") else None
