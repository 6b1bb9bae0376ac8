"""Train the runs of an experiment, and compare its variants with a control, paired by seed.

    python -m eval.sweep eval/experiments/lora_bilora.yaml
    python -m eval.sweep eval/experiments/radius_mini.yaml --output_dir results/radius_mini
    python -m eval.sweep eval/experiments/lora_bilora.yaml --seeds 0,1 \\
        --set max_train_steps=2 num_validation_images=0 --runs_dir runs/try    # minutes on a CPU

An experiment is a YAML file:

    recipe: recipes/mini.yaml
    variants:
      LoRA: {method: lora}
      LoRA-SAM: {method: lora-sam}
      Bi-LoRA: {method: bilora}
    axes: {rho: [0.05, 1]}             # Bi-LoRA with both; LoRA has no rho
    seeds: 0..4

Further keys: script (default: train_dreambooth_bilora.py), options (of all runs), control (default:
the first variant), metric (default: heldout_loss) and higher_is_better. If recipe is a list, there
is one comparison for each of its recipes.

Every run is checked by the training script's own parser before the first one starts. A finished run
is not repeated and an interrupted one goes on, so the same command can be given again at any time.
Writes rows.csv, summary.csv, result.json, report.md and sweep.png, beside the runs in
RUNS_DIR/EXPERIMENT.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.fields import option
from bilora_diffusion.core.files import without_paths
from bilora_diffusion.core.values import TRAINING_GRID_LOSS, WORKERS

from . import compare, plot
from . import sweep_reporting as reporting
from .command import Parser, open_folder, run
from .evaluation import Evaluation
from .report import Column
from .sources import open_run
from .subjects import Subject, by_group, paired
from .sweep_reporting import FINISHED, SECONDS, WAITING
from .table import Result, Row, command_line

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from .sweep_plan import Plan
    from .sweep_runs import Outcome


@dataclass(frozen=True)
class SweepOptions:
    """Flags of the command."""

    section = "sweep"
    set: list[str] = option([], "Options of all runs, NAME=VALUE.")  # noqa: RUF009
    seeds: str | None = option(None, "Seeds instead of the experiment's, as 0..4 or 0,1.")
    metric: str | None = option(None, "Key in metrics.jsonl instead of the experiment's.")
    runs_dir: Path = option(  # noqa: RUF009
        Path("runs"), "Folder that gets a folder of runs for each experiment."
    )
    jobs: int = option(1, "Runs at a time, which share the cores.", range=WORKERS)
    dry_run: bool = option(False, "Check and list the runs only.")


class Sweep(Evaluation):
    """The metric and the training loss of each finished run over training, and key figures.

    A subject is a run, a group is a variant. ``about`` of a subject has the run's outcome:
    ``status`` (finished, failed or waiting), ``exit_code`` and ``error``.

    ``settings``: ``recipe``, ``metric``, ``higher_is_better``, ``seeds``; ``arms``, label of a
    variant -> its ``options``; ``paired``, label -> whether its runs saw the control's inputs;
    ``equal_training``, the training loss at which variants are compared and the variant that sets
    it, or None.
    """

    name = "sweep"
    options = (SweepOptions,)

    def __init__(self, args: argparse.Namespace, command: str, plan: Plan) -> None:
        from .sweep_runs import Runner

        # Each experiment has its own folder; its result is beside its runs.
        runs_dir = args.runs_dir / plan.name
        args = argparse.Namespace(**vars(args))
        args.output_dir = args.output_dir or runs_dir / self.name
        super().__init__(args, command)
        self.plan = plan
        self.experiment = plan.experiment
        self.runner = Runner(plan.script, plan.recipe, runs_dir, args.jobs)
        variants: dict[str, Any] = {}
        for variant in plan.variants:
            variants[variant.label] = {"options": shown_options(variant.values)}
        self.settings |= {
            "recipe": plan.recipe.name,
            "metric": plan.experiment.metric,
            "higher_is_better": plan.experiment.higher_is_better,
            "seeds": list(plan.seeds),
            "arms": variants,
        }

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Check all experiments, then train and compare one after another."""
        words = sys.argv[1:] if argv is None else list(argv)
        command = command_line(f"eval.{cls.name}", words)

        def work() -> int:
            args = cls.parser().read(words)
            # All plans are checked before the first run starts.
            sweeps = [cls(args, command, plan) for plan in load_plans(args)]
            codes = [sweep.work() or 0 for sweep in sweeps]
            return max(codes)

        return run(work)

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        parser.add_argument(
            "experiments",
            nargs="+",
            type=Path,
            metavar="EXPERIMENT",
            help="YAML files; eval/experiments has those of the paper's tables",
        )
        parser.add_argument("--output_dir", type=Path, help=f"default: {cls.name}, beside the runs")

    def work(self) -> int | None:
        """List the runs, and unless it is a dry run train and compare them."""
        print(self.describe())
        if self.args.dry_run:
            return None
        open_folder(self.runner.runs_dir, "--runs_dir")
        return super().work()

    def describe(self) -> str:
        """The variants; in a dry run also the command line of each run and its folder's state."""
        from .sweep_runs import state

        plan = self.plan
        count = f"{len(plan.variants)} variants x {len(plan.seeds)} seeds = {len(plan.runs)} runs"
        lines = [f"{plan.name}: {count}"]
        for variant in plan.variants:
            mark = " (control)" if variant.label == plan.control else ""
            lines.append(f"  {variant.label}{mark}")
        if self.args.dry_run:
            for planned in plan.runs:
                folder_state = state(self.runner.runs_dir / planned.name)
                lines.append(f"\n{planned.name} ({folder_state})")
                lines.append(shlex.join(self.runner.command(planned)))
        return "\n".join(lines)

    def subjects(self) -> Sequence[Subject]:
        """The planned runs."""
        waiting = {"status": WAITING, "exit_code": None, "error": None}
        return [
            Subject(planned.name, planned.variant, seed=planned.seed, about=waiting)
            for planned in self.plan.runs
        ]

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """Train the runs that are not finished; print failures, after which the exit code is 1."""
        runs_dir = self.runner.runs_dir
        outcomes = self.runner.run_all(self.plan.runs)
        trained = [subject_of(runs_dir, outcome) for outcome in outcomes]
        self._require_metric(trained)
        failures = [outcome for outcome in outcomes if outcome.status != FINISHED]
        if failures:
            reasons = []
            for outcome in failures:
                reasons.append(f"{outcome.run} (exit code {outcome.exit_code}: {outcome.error})")
            print(
                f"error: {len(failures)} of {len(outcomes)} runs failed: {'; '.join(reasons)}."
                f" Their logs are {runs_dir}/RUN.log, and the same command tries them again.",
                file=sys.stderr,
            )
            self.exit_code = 1
        return trained

    def _require_metric(self, subjects: Sequence[Subject]) -> None:
        """Refuse a metric that no run has."""
        metric = self.experiment.metric
        names = set[str]()
        for subject in subjects:
            for line in subject.log():
                for name, value in line.items():
                    if isinstance(value, int | float):
                        names.add(name)
        names.discard("step")
        if names and metric not in names:
            raise UserError(
                f'no run has the metric "{metric}"{did_you_mean(metric, names)}: use --metric with'
                f" one of {', '.join(sorted(names))}."
            )

    def rows(self, subject: Subject) -> Iterator[Row]:
        names = dict.fromkeys((self.experiment.metric, TRAINING_GRID_LOSS))  # which may be the same
        measured, seconds = [], []
        for line in subject.log():
            if line.get("seconds") is not None:
                seconds.append(line["seconds"])
            # Both losses are compared at the steps at which the metric was measured.
            if self.experiment.metric in line:
                measured.append(line)
        for line in measured:
            for name in names:
                if name in line:
                    yield subject.row(name, line[name], step=line["step"])
        if subject.best_step is not None:
            measured = [line for line in measured if line["step"] <= subject.best_step]
        if measured:
            for name in names:
                yield subject.row(f"final {name}", measured[-1].get(name))
        # The median, since the first step may take long.
        if seconds:
            yield subject.row(SECONDS, statistics.median(seconds))

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        metric = self.experiment.metric
        control = self.plan.control
        finished = [subject for subject in subjects if subject.finished]
        # Runs are paired only if both saw the same inputs at each step.
        pairs: dict[str, bool | None] = {}
        if control in by_group(finished):
            pairs = paired(finished, control)
        unpaired = [group for group, is_paired in pairs.items() if is_paired is False]
        # A variant that learns less also overfits less. At one training loss that plays no part.
        common_loss, equal_rows = compare.equal_training(rows, metric, TRAINING_GRID_LOSS, unpaired)
        rows += compare.best(rows, metric, self.experiment.higher_is_better)
        rows += equal_rows
        lines = compare.summaries(rows, control, unpaired=unpaired)
        self.settings["paired"] = pairs
        self.settings["equal_training"] = None if common_loss is None else asdict(common_loss)
        result = self.result(subjects, rows, lines, control)
        self.notes += reporting.notes(result)
        return replace(result, metrics=reporting.metrics(result))

    def figures(self, result: Result, folder: Path) -> list[str]:
        size = (12, max(3.6, 0.34 * len(result.groups) + 1.6))
        row = reporting.panels(result)
        plot.panels(result, folder / "sweep.png", [row], control=result.control, figsize=size)
        return ["sweep.png"]

    def introduction(self, result: Result) -> str:
        return reporting.introduction(result)

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        columns = []
        for figure in reporting.KEY_FIGURES:
            name = f"{figure} {result.settings['metric']}"
            columns.append(Column(name, difference=True, interval=False))
        columns.append(Column(f"final {TRAINING_GRID_LOSS}", interval=False))
        columns.append(Column(SECONDS, interval=False))
        return {"": columns}

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        return {"seeds": lambda group: reporting.finished(result, group)}


def load_plans(args: argparse.Namespace) -> list[Plan]:
    """The plans of a command line, one for each recipe of each experiment."""
    from .sweep_plan import load

    plans: list[Plan] = []
    for path in args.experiments:
        plans += load(path, args.set, seeds=args.seeds, metric=args.metric)
    if args.output_dir is not None and len(plans) > 1:
        raise UserError(
            f"--output_dir is one folder for {len(plans)} comparisons: leave it out, then each is"
            " written beside its runs."
        )
    return plans


def shown_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's options without machine paths."""
    options = {}
    for name, value in values.items():
        options[name] = without_paths(value) if isinstance(value, str) else value
    return options


def subject_of(runs_dir: Path, outcome: Outcome) -> Subject:
    """A run as a subject; of a run that is not finished it has the outcome only."""
    about = {"status": outcome.status, "exit_code": outcome.exit_code, "error": outcome.error}
    if outcome.status == FINISHED:
        subject = open_run(runs_dir / outcome.run, outcome.run)
        return replace(subject, group=outcome.variant, about=about)
    name = outcome.run
    return Subject(name, outcome.variant, source=name, seed=outcome.seed, about=about)


main = Sweep.main

if __name__ == "__main__":
    sys.exit(main())
