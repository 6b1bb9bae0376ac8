"""Runs of a search: each an ordinary run folder, on models and data that are loaded once.

Several processes each train some of the runs, alone; all of them learn what all have measured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object

from ...config.options import OptimizerOptions
from ...config.run import RunConfig
from ...durable import discard, strict_json
from ...errors import Diverged, TrainingError, UserError
from ...fields import options_of
from ...methods import names as method_names
from ...methods import option_names, reads
from ...methods.options import SECTION
from ...run import checkpoint, runlog
from ...run.checkpoint import require_same_settings
from ...run.folder import FIT, FIT_RECORD, OF_FIT, clear
from ...run.interruption import Interruption, Stop
from ...run.record import read_fit
from ...run.runlog import RunLog
from ...seeds import digest_texts, parts
from ..stepping import Schedule, total_steps
from ..task import BY_SAMPLE, ReusableTask
from . import report
from .search import BUDGET, Curve, Plan, Search, Work, lowest
from .space import Options, Space, default_values, folder_name, read_values, title, words

FOLDS, LEAVE_ONE_OUT = 4, 8
"""Folds; below so many samples each is one."""
MEASUREMENTS = 20
"""Of a run of the whole length."""
FIXED = frozenset(
    (
        *("quantize", "auxiliaries_on", "lr_scheduler", "lr_warmup_steps", "warmup_ratio"),
        *("lr_num_cycles", "lr_power", "scale_lr", "use_8bit_adam"),
    )
)
"""Options of methods and optimizers that all runs of a fit share."""
Train = Callable[[Any, Path, int], Stop | None]
logger = logging.getLogger(__name__)


class _Stopped(Exception):
    """A signal ended a run."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop


@contextmanager
def alone() -> Iterator[None]:
    """Within the context accelerate takes this process for the only one."""
    states: list[Any] = [PartialState._shared_state, AcceleratorState._shared_state]
    before = [dict(state) for state in states]
    single = {"num_processes": 1, "process_index": 0, "distributed_type": DistributedType.NO}
    try:
        for state in states:
            state.update(single)
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.update(values)


def deal(names: Sequence[str], folds: int | None, what: str) -> list[tuple[list[int], list[int]]]:
    """The positions that each fold learns from, and those that it holds out; both in order.

    Args:
        names: of the samples, by which they are dealt; not by their order or the run's seed.
        folds: how many; None for `FOLDS`, or one for each of fewer than `LEAVE_ONE_OUT` samples.
        what: they are called, such as "images".

    Raises:
        UserError: there are fewer of them than folds, or than two, or one stands twice.
    """
    count = folds or (FOLDS if len(names) >= LEAVE_ONE_OUT else max(2, len(names)))
    if len(names) < count:
        raise UserError(
            f"--fit with {count} folds is refused, since there are {len(names)} {what}: give more,"
            " or a held-out set."
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f'"{twice}" stands twice among the {what}, so a fold would learn what it holds out:'
            " drop one."
        )
    every = range(len(names))
    return [(sorted(set(every) - set(held)), held) for held in parts(names, count)]


def make_plan(
    cfg: RunConfig, task: ReusableTask, accelerator: Accelerator, folds: int, typed: bool
) -> Plan:
    """The size of a search; ``typed``: whether the command line says how often to measure."""
    steps = total_steps(cfg, task.num_samples, Schedule.of(cfg, accelerator).step_size)
    every = math.ceil(steps / MEASUREMENTS)
    if typed and cfg.validation_loss_steps:
        every = min(steps, cfg.validation_loss_steps)
    return Plan(folds, steps, every, cfg.fit_budget or BUDGET * steps)


def searchable(cfg: RunConfig) -> set[str]:
    """The options that a fit may search: of methods, adapters and the optimizer."""
    sections = (SECTION, OptimizerOptions.section)
    groups = [group for group in cfg.groups if group.section in sections]
    return set(options_of(groups)) - FIXED


class Fit:
    """A search with its runs, in a run folder.

    Args:
        cfg: the command line as it was given.
        script: the training script.
        argv: the command line.
        task: what is trained, loaded.
        train: trains a task in a folder up to a step.
        accelerator: of all processes.

    Raises:
        UserError: a space or a budget that can't be searched, or samples that can't be dealt.
    """

    def __init__(
        self,
        cfg: RunConfig,
        script: Any,
        argv: Sequence[str],
        task: ReusableTask,
        train: Train,
        accelerator: Accelerator,
    ) -> None:
        self.cfg, self.task, self._train, self._accelerator = cfg, task, train, accelerator
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        self.folder, self._script, self._argv = Path(cfg.output_dir), script, argv
        self._typed = frozenset(type(cfg).parser().explicit(argv))
        self._configs: dict[Options, Any] = {}
        self.what = "images" if cfg.modality == "image" else "rows"
        self.parts: list[tuple[list[int], list[int]] | None] = [None]
        if not task.has_heldout:
            self.parts = [*deal(task.names, cfg.fit_folds, self.what)]
        often = "validation_loss_steps" in self._typed
        self.plan = make_plan(cfg, task, accelerator, len(self.parts), often)
        self.space = self._read_space()
        self._check()
        self._names: dict[str, Options] = {}
        self._runs: dict[tuple[Options, int], tuple[str, Curve]] = {}
        self.search = Search(self.plan, self._measure)

    def _read_space(self) -> Space:
        cfg, known = self.cfg, set(options_of(self.cfg.groups))
        if cfg.fit_space:
            values = read_values(Path(cfg.fit_space), searchable(cfg), known)
        else:
            values = default_values(
                self._typed,
                cfg.learning_rate,
                len(self.task.names),
                self._supports_sample(),
            )
        read_by = {name: reads(name) for name in method_names()}
        return Space(values, read_by, option_names())

    def _supports_sample(self) -> bool:
        form = (("method", "bilora"), ("rho", "auto"), ("auxiliaries", "sample"))
        try:
            self._config(form)
        except UserError:
            return False
        return True

    def _check(self) -> None:
        """Refuse values that the command line would, and a budget for less than a search."""
        for start in self.space.starts():
            for options in (o for name in self.space.values for o in self.space.along(name, start)):
                try:
                    self._config(options)
                except UserError as error:
                    raise UserError(f"in a run of --fit, {error}") from None
        least = max(self.plan.least, self.plan.third * len(self.space.starts()))
        if self.plan.budget < least:
            raise UserError(
                f"--fit_budget {self.plan.budget} is too small for a search of runs of"
                f" {self.plan.steps} steps on {self.plan.folds} folds: give at least {least}, or"
                " fewer --max_train_steps."
            )

    def settings(self) -> dict[str, Any]:
        """What the choice depends on."""
        cfg, names = self.cfg, self.task.names
        cut = ("train_batch_size", "gradient_accumulation_steps")
        told = {key: value for key, value in cfg.fingerprint().items() if key not in cut}
        size = Schedule.of(cfg, self._accelerator).step_size
        return {
            **told,
            **{"step_size": size, "samples": len(names), "names": digest_texts(names)},
            **{**vars(self.plan), "space": self.space.values},
        }

    def choose(self) -> Any:
        """Search, or go on with a search, and return the configuration to train with.

        Returns:
            The configuration; or the `Stop` of what stopped the search.

        Raises:
            UserError: the search that was begun in the folder had other settings.
            TrainingError: no configuration could be trained.
        """
        earlier = read_fit(self.folder / FIT_RECORD) if self.cfg.resume_from_checkpoint else None
        self._accelerator.wait_for_everyone()  # before the main process writes what all have read
        if earlier is not None:
            require_same_settings(earlier["settings"], strict_json(self.settings())[0])
            if (choice := earlier["choice"]) is not None:
                return self._final(tuple(choice["options"].items()), choice["steps"])
        log = self._begin(earlier is not None) if self._accelerator.is_main_process else None
        try:
            with Interruption(patient=True) as self._interruption:
                self.search.run(self.space)
        except _Stopped as stopped:
            _close(log, "interrupted")
            return stopped.stop
        except BaseException as error:
            kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            _close(log, kind, str(error) or None)
            raise
        if not self.search.curves.keys() - self.search.out.keys() - {()}:
            reason = next(iter(self.search.out.values()), "")
            _close(log, "failed", reason)
            raise TrainingError(f"no configuration could be trained ({reason}): lower the rates.")
        if log is not None:
            self._write(done=True)
            report.draw(self.folder, self.search)
            for place in self.folder.glob(f"{FIT}/*/{checkpoint.CHECKPOINTS}"):
                discard(place)
            log.close("running")
        return self._final(*self.search.chosen)

    def _begin(self, resumes: bool) -> RunLog:
        clear(self.folder, keep=OF_FIT if resumes else ())
        log = RunLog(self.folder, self._accelerator.device)
        log.start(self.cfg.to_dict(), self.cfg.method, self.cfg.seed, None)
        log.doing("search")
        self._write()
        return log

    def _write(self, done: bool = False) -> None:
        report.write(self.folder, self.settings(), self._runs, self.search, done)

    def _config(self, options: Options) -> Any:
        """The command line with further options, of which it says nothing once more; a scale of
        the adapters that is not typed follows the rank.
        """
        if options not in self._configs:
            rank, scale = dict(options).get("rank", ""), ()
            if rank.isdecimal() and "lora_alpha" not in self._typed:
                scale = (("lora_alpha", str(2 * int(rank))),)
            logging.disable(logging.WARNING)
            try:
                line = [*self._argv, *words((*scale, *options))]
                self._configs[options] = self._script.resolve(line)
            finally:
                logging.disable(logging.NOTSET)
        return self._configs[options]

    def _final(self, options: Options, steps: int) -> Any:
        """The configuration with the user's own schedule, rescaled to the chosen steps."""
        cfg, warm = self._config(options), self.cfg.lr_warmup_steps
        rescaled = warm and round(warm * steps / self.plan.steps)
        return replace(cfg, max_train_steps=steps, num_train_epochs=None, lr_warmup_steps=rescaled)

    def _of_run(self, work: Work, place: Path) -> Any:
        """The configuration of a run of the search: at a constant rate, with nothing to look at."""
        cfg, plan = self._config(work.options), self.plan
        changes = {
            **{"output_dir": str(place), "report_to": "none", "push_to_hub": False},
            **{"resume_from_checkpoint": None, "overwrite_output_dir": False},
            **{"log_dynamics": False, "eval_on_start": False, **cfg.without_samples},
            **{"max_train_steps": plan.steps, "num_train_epochs": None},
            **{"validation_loss_steps": plan.every, "checkpoints_total_limit": 1},
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": self.cfg.warmup_steps(plan.steps),
            # One process takes the steps that all of them take together in the last run.
            "gradient_accumulation_steps": cfg.gradient_accumulation_steps * self._processes,
        }
        return replace(cfg, **changes)

    def _name(self, work: Work) -> str:
        name = folder_name(work.options)
        while self._names.setdefault(name, work.options) != work.options:
            name += "+"
        return f"{name}_fold{work.fold + 1}" if len(self.parts) > 1 else name

    def _measure(self, works: Sequence[Work]) -> list[Curve | str]:
        """Train runs, each process some of them, and gather what all have measured."""
        names = [self._name(work) for work in works]
        size = self._processes
        results, stop, error = [], None, None
        with alone():
            for work, name in list(zip(works, names, strict=True))[self._rank :: size]:
                try:
                    result = self._one(work, name)
                except Exception as caught:
                    error = caught
                    break
                if isinstance(result, Stop):
                    stop = result
                    break
                results.append(result)
        if number := self._interruption.number:
            stop = stop or Stop(number, 0, self.plan.steps, "the next run")
        shared = gather_object([(results, stop, error and str(error))])
        if error is not None:
            raise error
        if reason := next((text for _, _, text in shared if text), None):
            raise TrainingError(f"another process could not go on: {reason}")
        if stop := next((one for _, one, _ in shared if one), None):
            raise _Stopped(stop)
        return [shared[i % size][0][i // size] for i in range(len(works))]

    def _one(self, work: Work, name: str) -> Curve | str | Stop:
        """Bring one run to its steps, or read it where that was done before."""
        place = self.folder / FIT / name
        if (reason := read_failure(place)) is not None:
            return reason
        curve = read_curve(place, work.steps)
        if curve is None:
            cfg = self._of_run(work, place)
            task = self.task.again(cfg, self.parts[work.fold], searches=True)
            try:
                if (stop := self._train(task, place, work.steps)) is not None:
                    return stop._replace(run=f"{FIT}/{name}")
            except Diverged as error:
                return str(error)
            curve = read_curve(place, work.steps)
            assert curve is not None
        self._note(work, name, curve)
        return curve

    def _note(self, work: Work, name: str, curve: Curve) -> None:
        loss, step = lowest(curve)
        at = f", fold {work.fold + 1}" if len(self.parts) > 1 else ""
        spent = f"{self.search.spent:,} of {self.plan.budget:,} steps"
        logger.info(
            "fit: %s%s, %d steps: lowest %.4f at step %d (%s planned)",
            *(title(work.options) or "as given", at, work.steps, loss, step, spent),
        )
        self._runs[work.options, work.fold] = (name, curve)
        if self._rank == 0:
            self._write()


def read_curve(folder: Path, steps: int) -> Curve | None:
    """What a run has measured up to a step; None where it has not come so far."""
    saved = checkpoint.steps(folder)
    if not saved or saved[-1] < steps:
        return None
    curve = {}
    for row in runlog.read_metrics(folder):
        losses = [value for key, value in row.items() if key.startswith(BY_SAMPLE)]
        if losses and row["step"] <= steps:
            finite = [math.inf if value is None else value for value in losses]
            curve[row["step"]] = np.array(finite)
    return curve if steps in curve else None


def read_failure(folder: Path) -> str | None:
    """Why a run could not go on, where its loss is to blame."""
    if not (folder / runlog.RUN).exists():
        return None
    record = runlog.read_run(folder)
    return record["error"] if record["results"].get("diverged") else None


def _close(log: RunLog | None, status: str, reason: str | None = None) -> None:
    if log is not None:
        log.close(status, reason)
