"""A search with its runs: each has an ordinary run folder; models and data are loaded once.

Several processes share the runs. Each process trains its runs alone, and gets all measurements.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ...config.options import OptimizerOptions
from ...config.resolving import collected_notes
from ...core.durable import discard, strict_json
from ...core.errors import TrainingError, UserError
from ...core.fields import options_of
from ...core.seeds import deal_into_parts
from ...core.values import MEASURE_TITLES
from ...methods import for_run
from ...methods.options import SECTION
from ...run import checkpoint
from ...run.data import record_content, summarize
from ...run.folder import FIT, FIT_RECORD, clear
from ...run.interruption import Interruption, Stop
from ...run.record import read_search
from ...run.runlog import RunLog
from .. import setup
from ..loop import recorded
from ..optimizers import StepLayout, total_steps
from ..resume import require_same_work
from ..task import Fold
from . import report
from .halving import BUDGET, Curve, Halving, Plan, Trial, lowest_point
from .space import (
    METHOD,
    Candidate,
    Space,
    Values,
    arguments,
    bilora_form,
    default_values,
    read_values,
)
from .trials import SearchStopped, read_curve, train_trial

# Default number of folds.
FOLDS = 4
# With fewer samples than this each sample is a fold.
LEAVE_ONE_OUT = 8
# Options of methods and optimizers that are the same in all runs of a search.
SHARED_OPTIONS = frozenset(
    {
        "quantize",
        "scale_lr",
        "use_8bit_adam",
        # The schedule: with a constant rate each step of a run is a possible end.
        "lr_scheduler",
        "lr_warmup_steps",
        "warmup_ratio",
        "lr_num_cycles",
        "lr_power",
    }
)
# Options of every run of a search: a constant rate, and neither trackers nor samples.
RUN_OPTIONS = {
    "report_to": "none",
    "push_to_hub": False,
    "log_dynamics": False,
    "eval_on_start": False,
    "resume_from_checkpoint": None,
    "overwrite_output_dir": False,
    "num_train_epochs": None,
    "lr_scheduler": "constant_with_warmup",
    "checkpoints_total_limit": 1,
}
logger = logging.getLogger(__name__)


class Search:
    """A search with its runs, in a run folder.

    Args:
        script: resolves command lines, and trains runs.
        argv: the command line.
        task: its task; serves all runs.
        accelerator: engine of all processes.

    Attributes:
        plan: size of the search.
        space: options that are searched.
        halving: the search as a function of the measurements.
        sample_noun: name of the samples in the plural.
    """

    def __init__(
        self, script: setup.Script[Any], argv: Sequence[str], task: Any, accelerator: Accelerator
    ) -> None:
        cfg = task.cfg
        self.cfg = cfg
        self.task = task
        self.folder = Path(cfg.output_dir)
        self.sample_noun = "images" if cfg.modality == "image" else "rows"
        self._script = script
        self._argv = argv
        self._configs: dict[Candidate, Any] = {}
        self._typed = frozenset(type(cfg).parser().explicit(argv))
        self._accelerator = accelerator
        self._rank = accelerator.process_index
        self._processes = accelerator.num_processes
        self._step_size = StepLayout.from_config(cfg, accelerator).step_size
        self._folds: list[Fold | None] = [None]  # the held-out set is the one fold
        if not task.has_heldout:
            self._folds = list(deal_folds(task.names, cfg.fit_folds, self.sample_noun))

        steps = total_steps(cfg, task.num_samples, self._step_size)
        # Unless the user gives an interval.
        interval = cfg.measurement_interval(steps)
        if "validation_loss_steps" in self._typed and cfg.validation_loss_steps:
            interval = min(steps, cfg.validation_loss_steps)
        budget = cfg.fit_budget or BUDGET * steps
        self.plan = Plan(len(self._folds), steps, interval, budget)
        self.space = Space(self._space_values(), extends_rates=cfg.fit_space is None)
        self._require_possible()
        self.halving = Halving(self.plan, self._train_trials)

    def _space_values(self) -> Values:
        """The values of the file of ``--fit_space``, or the default ones."""
        if self.cfg.fit_space:
            sections = (SECTION, OptimizerOptions.section)
            groups = [group for group in self.cfg.groups if group.section in sections]
            searchable = options_of(groups).keys() - SHARED_OPTIONS
            return read_values(Path(self.cfg.fit_space), searchable)
        form = bilora_form(self.cfg.heldout_measure)
        bilora = dict(form)
        del bilora[METHOD]
        # --scale_lr multiplies the rate of each run, so the space has rates before that.
        rate = self.config((("scale_lr", "false"),)).learning_rate
        return default_values(self._typed, rate, self.cfg.rank, bilora)

    def _require_possible(self) -> None:
        """Refuse values that the command line would refuse, and a budget that is too small."""
        starts = self.space.starts()
        try:
            for start in starts:
                for name in self.space.values:
                    for candidate in self.space.variants(name, start):
                        self.config(candidate)
        except UserError as error:
            raise UserError(f"in a run of --fit, {error}") from None
        # The first rung of each start, or all folds of a single one.
        smallest_budget = max(self.plan.folds, len(starts)) * self.plan.first_rung
        if self.plan.budget < smallest_budget:
            raise UserError(
                f"--fit_budget {self.plan.budget} is too small for runs of {self.plan.steps} steps"
                f" on {self.plan.folds} folds: give at least {smallest_budget}, or fewer"
                " --max_train_steps."
            )

    def config(self, candidate: Candidate) -> Any:
        """Make the configuration of the command line with the options of a candidate.

        It is resolved as a whole, since defaults and checks depend on the options. An alpha that is
        not typed keeps its ratio to the rank: two, or that of the recipe.
        """
        if candidate in self._configs:
            return self._configs[candidate]
        words = arguments(candidate)
        rank = dict(candidate).get("rank", "")
        if rank.isdecimal() and "lora_alpha" not in self._typed:
            ratio = self.cfg.lora_alpha / self.cfg.rank
            words = ["--lora_alpha", f"{ratio * int(rank):.9g}", *words]
        with collected_notes():  # they were printed with the command line
            self._configs[candidate] = self._script.resolve([*self._argv, *words])
        return self._configs[candidate]

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The record of the data, which a dry run does not need."""
        return record_content(self.task.training_content(), self.task.heldout_content())

    def _settings(self) -> dict[str, Any]:
        """Settings that the choice depends on, for ``fit.json``."""
        settings = self.cfg.resume_settings()
        # The choice depends on the size of a step, but not on its micro-batches.
        del settings["train_batch_size"], settings["gradient_accumulation_steps"]
        return {
            **settings,
            "step_size": self._step_size,
            "measure": self.cfg.heldout_measure,
            "samples": len(self.task.names),
            "folds": self.plan.folds,
            "steps": self.plan.steps,
            "every": self.plan.interval,
            "budget": self.plan.budget,
            "space": self.space.values,
            "content": self._content,
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
        """Search, or go on with the folder's search.

        Returns:
            The configuration to train with, or a `Stop`.
        """
        # With a checkpoint, of the last run, the search itself stays.
        resumes = self.cfg.resume_from_checkpoint is not None
        overwrite = self.cfg.overwrite_output_dir and not resumes
        record = None if overwrite else read_search(self.folder / FIT_RECORD)
        self._accelerator.wait_for_everyone()  # all read the record before one replaces it
        if record is not None:
            self._require_same_search(record["settings"])
            choice = record["choice"]
            if choice is not None:
                return self.final_config(tuple(choice["options"].items()), choice["steps"])
        log = None
        if self._rank == 0:
            clear(self.folder, overwrite)
            log = RunLog(self.folder, self._accelerator.device)
            content = summarize(self._content)
            log.start(self.cfg.to_dict(), self.cfg.method, self.cfg.seed, None, content=content)
            log.record_activity("search")
            self._write_record()
        try:
            with recorded(log, self.folder), Interruption(patient=True) as self._interruption:
                self.halving.run(self.space)
                if log is not None:
                    self._write_record(is_done=True)
                    report.draw(self.folder, self.halving, MEASURE_TITLES[self.cfg.heldout_measure])
                    # After the choice no run of the search goes on.
                    for checkpoints in self.folder.glob(f"{FIT}/*/{checkpoint.CHECKPOINTS}"):
                        discard(checkpoints)
        except SearchStopped as error:
            return error.args[0]
        if log is not None:
            log.close("running")  # the last run continues the record
        return self.final_config(*self.halving.choice)

    def _write_record(self, is_done: bool = False) -> None:
        if self._rank == 0:
            report.write(self.folder, self._settings(), self.halving, is_done)

    def final_config(self, candidate: Candidate, steps: int) -> Any:
        """The configuration of the last run: the user's schedule, scaled to the chosen steps."""
        cfg = self.config(candidate)
        warmup_steps = self.cfg.lr_warmup_steps
        if warmup_steps:
            # The warm-up keeps its share of the steps.
            warmup_steps = round(warmup_steps * steps / self.plan.steps)
        return replace(
            cfg, max_train_steps=steps, num_train_epochs=None, lr_warmup_steps=warmup_steps
        )

    def trial_config(self, candidate: Candidate, folder: Path) -> Any:
        """Make the configuration of a run of the search."""
        cfg = self.config(candidate)
        options = {**RUN_OPTIONS, **cfg.without_samples}
        options["output_dir"] = str(folder)
        options["max_train_steps"] = self.plan.steps
        options["validation_loss_steps"] = self.plan.interval
        options["lr_warmup_steps"] = self.cfg.warmup_steps(self.plan.steps)
        # One process takes the whole steps, which all processes share in the last run.
        options["gradient_accumulation_steps"] = cfg.gradient_accumulation_steps * self._processes
        return replace(cfg, **options)

    def _train_trials(self, trials: Sequence[Trial]) -> Iterator[Curve | str]:
        """Train runs, one at a time on each process, and give their curves."""
        for start in range(0, len(trials), self._processes):
            yield from self._train_together(trials[start : start + self._processes])
            self._write_record()  # for the viewer

    def _train_together(self, trials: Sequence[Trial]) -> list[Curve | str]:
        """Train one run on each process, and gather all curves."""
        curve: Curve | str = ""
        error: BaseException | None = None
        shared_error: BaseException | None = None
        try:
            # In the last round there may be fewer trials than processes.
            if self._rank < len(trials):
                curve = self._train_trial(trials[self._rank])
            # A signal during the round ends the search after it; its runs keep their curves.
            number = self._interruption.number
            if number:
                raise SearchStopped(Stop(number, 0, self.plan.steps, "the next run"))
        except SearchStopped as stopped:
            error = shared_error = stopped
        except Exception as failure:
            # The other processes get an error too: they would wait for ever.
            error = failure
            reason = str(failure) or repr(failure)
            shared_error = TrainingError(f"another process could not go on: {reason}")
        results = gather_object([(curve, shared_error)])  # by process
        if error is not None:
            raise error
        for _, error_elsewhere in results:
            if error_elsewhere is not None:
                raise error_elsewhere
        return [curve for curve, _ in results[: len(trials)]]

    def _train_trial(self, trial: Trial) -> Curve | str:
        """Train one run to its steps, or read its curve if that was done before.

        Returns:
            Its curve, or why it could not be trained.
        """
        name = self.plan.folder_name(trial)
        folder = self.folder / FIT / name
        curve = read_curve(folder, trial.steps, self.cfg.heldout_measure)
        # A resumed search finds runs that the interrupted one has trained.
        if curve is None:
            fold = self._folds[trial.fold]
            try:
                cfg = self.trial_config(trial.candidate, folder)
                task = self.task.with_config(cfg, fold, is_trial=True)
                for_run(vars(cfg), self.plan.steps)
            except UserError as error:
                # Values that go with others of the space need not go with each other.
                return str(error)
            curve = train_trial(self._script, task, folder, trial)
        if not isinstance(curve, str):
            loss, step = lowest_point(curve)
            logger.info("fit: %s to step %d, lowest %.4f at %d", name, trial.steps, loss, step)
        return curve


def deal_folds(names: Sequence[str], folds: int | None, noun: str) -> list[Fold]:
    """Deal samples into folds by their names.

    Args:
        names: names of the samples.
        folds: number of folds; None for the default.
        noun: name of the samples in the plural.

    Returns:
        For each fold the positions to learn from, and those to hold out.

    Raises:
        UserError: there are fewer samples than folds, or than two, or two have the same name.
    """
    if len(names) < 2:
        raise UserError(
            f"--fit needs 2 {noun}, there is {len(names)}: give more {noun}, or a held-out set."
        )
    count = folds
    if not count:
        count = FOLDS if len(names) >= LEAVE_ONE_OUT else max(2, len(names))
    try:
        heldout_parts = deal_into_parts(names, count)
    except ValueError as error:
        fault = f"--fit by {count} folds of {len(names)} {noun} is refused: {error}"
        raise UserError(f"{fault} Give more, each once, or a held-out set.") from None
    fold_list: list[Fold] = []
    for heldout in heldout_parts:
        training = sorted(set(range(len(names))) - set(heldout))
        fold_list.append((training, heldout))
    return fold_list
