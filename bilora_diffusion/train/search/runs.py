"""Runs of a search: each an ordinary run folder, on models and data that are loaded once.

Several processes each train some of the runs, alone; all of them learn what all have measured.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object

from ...config.options import OptimizerOptions
from ...config.run import twentieth
from ...core.durable import discard, strict_json
from ...core.errors import Diverged, TrainingError, UserError
from ...core.fields import options_of
from ...core.seeds import parts
from ...methods import for_run
from ...methods.options import SECTION
from ...run import checkpoint, runlog
from ...run.content import record_content, summarize
from ...run.folder import FIT, FIT_RECORD, clear
from ...run.interruption import Interruption, Stop
from ...run.record import read_fit
from ..recording import recorded
from ..stepping import Schedule, total_steps
from ..task import BY_SAMPLE
from ..trainer import require_same_work
from . import report
from .halving import (
    BUDGET,
    Curve,
    Plan,
    Search,
    Work,
    lowest,
)
from .space import (
    Options,
    Space,
    Values,
    bilora_form,
    default_values,
    read_values,
    title,
    words,
)

FOLDS, LEAVE_ONE_OUT = 4, 8  # folds; below so many samples each is one
# Options of methods and optimizers that all runs of a fit share.
SCHEDULE = {"lr_scheduler", "lr_warmup_steps", "warmup_ratio", "lr_num_cycles", "lr_power"}
FIXED = {"quantize", "scale_lr", "use_8bit_adam", *SCHEDULE}
QUIET = {  # every run of a search: at a constant rate, with nothing to look at
    **{"report_to": "none", "push_to_hub": False, "log_dynamics": False, "eval_on_start": False},
    **{"resume_from_checkpoint": None, "overwrite_output_dir": False, "num_train_epochs": None},
    **{"lr_scheduler": "constant_with_warmup", "checkpoints_total_limit": 1},
}
TOO_LARGE = "does not fit the memory of the device"
Train = Callable[[Any, Path, int], Stop | None]
logger = logging.getLogger(__name__)


class _Stopped(KeyboardInterrupt):
    """A signal ended a run; the argument is its `Stop`."""


@contextmanager
def alone() -> Iterator[None]:
    """Within the context accelerate takes this process for the only one."""
    states: list[Any] = [PartialState._shared_state, AcceleratorState._shared_state]
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.update(num_processes=1, process_index=0, distributed_type=DistributedType.NO)
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.update(values)


def deal(names: Sequence[str], folds: int | None, what: str) -> list[tuple[list[int], list[int]]]:
    """The positions that each fold learns from, and those that it holds out, dealt by the samples'
    names; a `UserError` if there are fewer than folds, or than two, or one stands twice.
    """
    count = folds or (FOLDS if len(names) >= LEAVE_ONE_OUT else max(2, len(names)))
    try:
        dealt = parts(names, count)
    except ValueError as error:
        fault = f"--fit by {count} folds of {len(names)} {what} is refused: {error}"
        raise UserError(f"{fault} Give more, each once, or a held-out set.") from None
    return [(sorted(set(range(len(names))) - set(held)), held) for held in dealt]


class Fit:
    """A search with its runs, in a run folder; the ``script`` resolves the command line ``argv`` to
    the configuration of the ``task``, and ``train`` brings a task in a folder to a step.
    """

    def __init__(
        self, script: Any, argv: Sequence[str], task: Any, train: Train, accelerator: Accelerator
    ) -> None:
        cfg, names = task.cfg, task.names
        self.cfg, self.task, self._train, self._accelerator = cfg, task, train, accelerator
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        self.folder, self._script, self._argv = Path(cfg.output_dir), script, argv
        self._typed = frozenset(type(cfg).parser().explicit(argv))
        self.what = "images" if cfg.modality == "image" else "rows"
        self._folds: Any = [None] if task.has_heldout else deal(names, cfg.fit_folds, self.what)
        self._step_size = Schedule.of(cfg, accelerator).step_size
        steps = total_steps(cfg, task.num_samples, self._step_size)
        given = cfg.validation_loss_steps if "validation_loss_steps" in self._typed else 0
        every, budget = min(steps, given or twentieth(steps)), cfg.fit_budget or BUDGET * steps
        self.plan = Plan(len(self._folds), steps, every, budget)
        self.space = Space(self._values())
        self._check()
        self.search = Search(self.plan, self._measure)

    def _values(self) -> Values:
        if self.cfg.fit_space:
            sections = (SECTION, OptimizerOptions.section)
            searchable = options_of([g for g in self.cfg.groups if g.section in sections])
            return read_values(Path(self.cfg.fit_space), searchable.keys() - FIXED)
        supports = False
        with suppress(UserError):
            supports = bool(for_run(vars(self.config(bilora_form())), 1, self.task.names))
        # --scale_lr multiplies the rate of each run, so the space has rates before that.
        rate = self.config((("scale_lr", "false"),)).learning_rate
        return default_values(self._typed, rate, self.cfg.rank, supports)

    def _check(self) -> None:
        """Refuse values that the command line would, and a budget for less than a search."""
        plan, starts = self.plan, self.space.starts()
        try:
            for start, name in itertools.product(starts, self.space.values):
                for options in self.space.along(name, start):
                    self.config(options)
        except UserError as error:
            raise UserError(f"in a run of --fit, {error}") from None
        if plan.budget < (least := max(plan.folds, len(starts)) * plan.first):
            raise UserError(
                f"--fit_budget {plan.budget} is too small for runs of {plan.steps} steps on"
                f" {plan.folds} folds: give at least {least}, or fewer --max_train_steps."
            )

    def config(self, options: Options) -> Any:
        """The command line with further options. An alpha that is not typed keeps its ratio to the
        rank: two, or the recipe's.
        """
        rank, alpha = dict(options).get("rank", ""), []
        if rank.isdecimal() and "lora_alpha" not in self._typed:
            ratio = self.cfg.lora_alpha / self.cfg.rank
            alpha = ["--lora_alpha", f"{ratio * int(rank):.9g}"]
        logging.disable(logging.WARNING)  # it has said everything once
        try:
            return self._script.resolve([*self._argv, *alpha, *words(options)])
        finally:
            logging.disable(logging.NOTSET)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The record of the data, which a dry run does not need."""
        return record_content(self.task.training_content(), self.task.heldout_content())

    def _settings(self) -> dict[str, Any]:
        """Settings that the choice depends on."""
        options = self.cfg.resume_settings()
        del options["train_batch_size"], options["gradient_accumulation_steps"]
        return {
            **options,
            **{"step_size": self._step_size, "samples": len(self.task.names)},
            **{**vars(self.plan), "space": self.space.values, "content": self._content},
        }

    def _require_same_search(self, saved: dict[str, Any]) -> None:
        """Refuse to go on with a search of other settings or other data."""
        require_same_work(
            saved,
            strict_json(self._settings())[0],
            options=self.cfg.resume_settings().keys(),
            free={"names"},  # which the record of the data has replaced
            depends_on_heldout=True,
        )

    def choose(self) -> Any:
        """Search, or go on with the folder's: the configuration to train with, or a `Stop`."""
        overwrite = self.cfg.overwrite_output_dir
        earlier = None if overwrite else read_fit(self.folder / FIT_RECORD)
        self._accelerator.wait_for_everyone()  # before the main process writes what all have read
        if earlier is not None:
            self._require_same_search(earlier["settings"])
            if (choice := earlier["choice"]) is not None:
                return self._final(tuple(choice["options"].items()), choice["steps"])
        log = None
        if self._rank == 0:
            clear(self.folder, overwrite)
            log = runlog.RunLog(self.folder, self._accelerator.device)
            content = summarize(self._content)
            log.start(self.cfg.to_dict(), self.cfg.method, self.cfg.seed, None, content=content)
            log.doing("search")
            self._write()
        try:
            with recorded(log, self.folder), Interruption(patient=True) as self._interruption:
                self.search.run(self.space)
                if log is not None:
                    self._write(done=True)
                    report.draw(self.folder, self.search)
                    for place in self.folder.glob(f"{FIT}/*/{checkpoint.CHECKPOINTS}"):
                        discard(place)
        except _Stopped as stopped:
            return stopped.args[0]
        if log is not None:
            log.close("running")
        return self._final(*self.search.chosen)

    def _write(self, done: bool = False) -> None:
        if self._rank == 0:
            report.write(self.folder, self._settings(), self.search, done)

    def _final(self, options: Options, steps: int) -> Any:
        """The configuration with the user's schedule, if any, rescaled to the chosen steps."""
        cfg, warm = self.config(options), self.cfg.lr_warmup_steps
        # Plain LoRA learns by heart while the rate falls.
        gains = for_run(vars(cfg), steps, self.task.names).gains_from_decay
        if gains and "lr_scheduler" not in self._typed and cfg.lr_scheduler.startswith("constant"):
            cfg, steps = replace(cfg, lr_scheduler="linear"), 2 * steps
        rescaled = warm and round(warm * steps / self.plan.steps)
        return replace(cfg, max_train_steps=steps, num_train_epochs=None, lr_warmup_steps=rescaled)

    def _of_run(self, work: Work, place: Path) -> Any:
        """The configuration of a run of the search."""
        cfg, plan = self.config(work.options), self.plan
        # One process takes the steps that all of them take together in the last run.
        pieces = cfg.gradient_accumulation_steps * self._processes
        own = {"max_train_steps": plan.steps, "validation_loss_steps": plan.every}
        own |= {"output_dir": str(place), "gradient_accumulation_steps": pieces}
        warm = self.cfg.warmup_steps(plan.steps)
        return replace(cfg, **{**QUIET, **cfg.without_samples, **own, "lr_warmup_steps": warm})

    def _measure(self, works: Sequence[Work]) -> Iterator[Curve | str]:
        """Train runs, at a time one on each process, and give what was measured."""
        for first in range(0, len(works), self._processes):
            yield from self._together(works[first : first + self._processes])
            self._write()  # which the viewer shows

    def _together(self, works: Sequence[Work]) -> list[Curve | str]:
        """Train one run on each process, and gather what all have measured."""
        curve, end, sent = "", None, None
        try:
            if self._rank < len(works):
                with alone():
                    curve = self._one(works[self._rank])
            if number := self._interruption.number:
                raise _Stopped(Stop(number, 0, self.plan.steps, "the next run"))
        except _Stopped as error:
            end = sent = error
        except Exception as error:  # the others are to know it, who would wait for ever
            end, reason = error, str(error) or repr(error)
            sent = TrainingError(f"another process could not go on: {reason}")
        curves, errors = zip(*gather_object([(curve, sent)]), strict=True)
        for error in filter(None, (end, *errors)):
            raise error
        return list(curves[: len(works)])

    def _one(self, work: Work) -> Curve | str:
        """Bring one run to its steps, or read it where that was done before."""
        name = self.plan.name(work)
        place = self.folder / FIT / name
        if (curve := read_curve(place, work.steps)) is None:
            fits = self._train_within_memory(work, place)
            curve = read_curve(place, work.steps) if fits else TOO_LARGE
            assert curve is not None
        if not isinstance(curve, str):
            logger.info("fit: %s to step %d, lowest %.4f at %d", name, work.steps, *lowest(curve))
        return curve

    def _train_within_memory(self, work: Work, place: Path) -> bool:
        """Bring a run to its steps; False where the device's memory does not suffice for it."""
        name, fits = place.name, True
        task = self.task.again(self._of_run(work, place), self._folds[work.fold], searches=True)
        try:
            with suppress(Diverged):  # its record has the reason
                if (stop := self._train(task, place, work.steps)) is not None:
                    raise _Stopped(stop._replace(run=f"{FIT}/{name}"))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if not fits:  # here the error is gone, and with it the frames that hold the run's tensors
            gc.collect()
            torch.cuda.empty_cache()
            logger.warning("fit: %s %s, so it is left out", title(work.options), TOO_LARGE)
        return fits


def is_out_of_memory(error: BaseException | None) -> bool:
    """Test that an error, or one that it was raised from, says that a device's memory is full."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


def read_curve(folder: Path, steps: int) -> Curve | str | None:
    """Losses of a run up to a step, or why it can't come so far; None where it did not yet."""
    if max(checkpoint.steps(folder), default=0) >= steps:
        curve = {}
        for row in runlog.read_metrics(folder):
            losses = [value for key, value in row.items() if key.startswith(BY_SAMPLE)]
            if losses and row["step"] <= steps:
                curve[row["step"]] = np.array([math.inf if v is None else v for v in losses])
        return curve
    record = runlog.read_run(folder) if (folder / runlog.RUN).exists() else {"results": {}}
    return record["error"] if record["results"].get("diverged") else None
