"""Train the runs of an experiment, and compare its variants with a control, paired by seed.

    python -m eval.sweep eval/experiments/lora_bilora.yaml
    python -m eval.sweep eval/experiments/pictures_icons.yaml --output_dir results/pictures_icons
    python -m eval.sweep eval/experiments/sdxl_3d_icon.yaml --dry_run         # hours and memory
    python -m eval.sweep eval/experiments/pictures_icons.yaml --variants "LoRA;Bi-LoRA" \\
        --seeds 0 --steps 20,40 --max_prompts 8 --runs_dir runs/try          # minutes on a CPU

An experiment is a YAML file such as this one:

    recipe: recipes/mini.yaml
    variants:
      LoRA: {method: lora}
      LoRA-SAM: {method: lora-sam}
      Bi-LoRA: {method: bilora}
    axes: {rho: [0.05, 1]}             # both values for LoRA-SAM and Bi-LoRA; LoRA has no rho
    seeds: 0..4
    scores:                            # sample checkpoints and score the samples
      prompts: mini-heldout            # --prompts of eval.clip_scores, or heldout
      max_prompts: 32
      steps: [100, 300]                # checkpoints
      guidances: [adapter:4, base:2]   # source of the unconditional prediction, and the scale
      seeds: [0]                       # seeds of the images of each prompt
      options: {skip_captions: true}   # further options of eval.clip_scores
      conditions: {plain: {}, int8: {base_precision: int8}, "5 steps": {num_inference_steps: 5}}
      memory_gigabytes: 38             # size of large models that sample and score, all together

Further keys: script (default: train_dreambooth_bilora.py), options (for all runs), control
(default: the first variant), metric (default: heldout_loss) and higher_is_better. If recipe is a
list, there is one comparison for each recipe. `prompts: heldout` takes the captions of the runs'
held-out images. With scores, the runs end at the last of the steps and keep their checkpoints.

Conditions are named options of eval.clip_scores: each checkpoint is sampled in every condition. The
report has tables of variants and conditions for each metric, and tables of the changes of the main
metrics from the first condition.

"guidance 4" takes both predictions from the adapted model, which is ordinary classifier-free
guidance; "base's guidance 2" takes the unconditional prediction from the base model. All variants
get the same prompts and the same initial noise. The value of a training seed is the mean over all
images of a checkpoint.

Before the first run starts, the training script's own parser checks every run, and the scorer and
the memory of the GPU are checked too. The same command can be run again at any time: it skips
finished runs and resumes interrupted ones. With scores, the command also keeps and skips runs whose
rows are in --output_dir: seeds and variants can be added later, without the folders of the earlier
runs. Each run trains on one GPU; with --jobs, several runs are trained at a time, on all GPUs.

Writes rows.csv, summary.csv, result.json, report.md and figures into --output_dir, by default
RUNS_DIR/EXPERIMENT/sweep, next to the runs. With a list of recipes, the runs and results are in
RUNS_DIR/EXPERIMENT/RECIPE. These files contain no absolute path of this machine.
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
from bilora_diffusion.core.files import counted, without_paths
from bilora_diffusion.core.values import TRAINING_GRID_LOSS, WORKERS

from ..command import COUNTS, Parser, open_folder
from ..evaluation import Evaluation
from ..results import compare, plot
from ..results.report import Column
from ..results.table import Result, Row
from ..sources import open_run
from ..subjects import Subject, by_group, check_pairing
from . import losses
from .losses import FINISHED, SECONDS, WAITING

if TYPE_CHECKING:  # imported inside functions, so that --help does not wait for torch
    from .plan import Plan, Run
    from .runs import Outcome


FIGURE = "sweep.png"


@dataclass(frozen=True)
class SweepOptions:
    """Flags of the command."""

    section = "sweep"
    set: list[str] = option([], "Options of all runs, as NAME=VALUE.")  # noqa: RUF009
    variants: str | None = option(
        None, "Labels of the variants to train, separated by semicolons (default: all variants)."
    )
    seeds: str | None = option(None, "Seeds instead of the experiment's, such as 0..4 or 0,1.")
    metric: str | None = option(None, "Key in metrics.jsonl instead of the experiment's metric.")
    steps: str | None = option(None, "Steps of the sampled checkpoints instead of scores.steps.")
    guidances: str | None = option(
        None, "Kinds of guidance instead of scores.guidances, such as adapter:4,base:2."
    )
    max_prompts: int | None = option(
        None, "Sample only this number of prompts, starting with the first.", range=COUNTS
    )
    processes: int | None = option(None, "Number of sampling processes.", range=WORKERS)
    runs_dir: Path = option(  # noqa: RUF009
        Path("runs"), "Parent folder; each experiment gets a folder of runs in it."
    )
    jobs: int = option(
        1, "Number of runs at a time, which share the cores and the GPUs.", range=WORKERS
    )
    dry_run: bool = option(
        False, "Only check and list the runs; with scores, also show the hours and the memory."
    )


class Sweep(Evaluation):
    """A sweep without samples: it compares the metric and the training loss of finished runs.

    A subject is a run, and a group is a variant. ``about`` of a subject describes the outcome of
    the run: ``status`` (finished, failed or waiting), ``exit_code`` and ``error``.

    ``settings``:

    - ``experiment``, ``recipe``, ``metric``, ``higher_is_better``, ``seeds``;
    - ``variants``: label -> options of the variant;
    - ``paired``: label -> whether the variant's runs saw the same inputs as the control's runs;
    - ``equal_training``: the training loss at which variants are compared and the variant that sets
      it, or None.
    """

    name = "sweep"
    options = (SweepOptions,)

    def __init__(self, args: argparse.Namespace, command: str, plan: Plan) -> None:
        from .runs import Runner

        # Each experiment has a separate folder for its runs and its result.
        runs_dir = args.runs_dir / plan.name
        args = argparse.Namespace(**vars(args))
        args.output_dir = args.output_dir or runs_dir / self.name
        super().__init__(args, command)
        self.plan = plan
        self.experiment = plan.experiment
        self.runner = Runner(plan.script, plan.recipe, runs_dir, args.jobs)
        variants = {}
        for variant in plan.variants:
            variants[variant.label] = shown_options(variant.options)
        self.settings |= {
            "experiment": str(plan.name),
            "recipe": plan.recipe.name,
            "metric": plan.experiment.metric,
            "higher_is_better": plan.experiment.higher_is_better,
            "seeds": list(plan.seeds),
            "variants": variants,
        }

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        parser.add_argument(
            "experiments",
            nargs="+",
            type=Path,
            metavar="EXPERIMENT",
            help="YAML files, such as those in eval/experiments",
        )
        parser.add_argument(
            "--output_dir", type=Path, help=f"default: {cls.name}, next to the runs"
        )

    def work(self) -> int | None:
        """Print the plan; unless this is a dry run, train and compare the runs."""
        print(self.describe_plan())
        if self.args.dry_run:
            return None
        open_folder(self.runner.runs_dir, "--runs_dir")
        return super().work()

    def describe_plan(self) -> str:
        """Return a list of the variants; in a dry run, also each run's state and command line."""
        from .runs import describe_state

        plan = self.plan
        variants = counted(len(plan.variants), "variant")
        seeds, runs = counted(len(plan.seeds), "seed"), counted(len(plan.runs), "run")
        lines = [f"{plan.name}: {variants} x {seeds} = {runs}"]
        for variant in plan.variants:
            mark = " (control)" if variant.label == plan.control else ""
            lines.append(f"  {variant.label}{mark}")
        if self.args.dry_run:
            for planned in plan.runs:
                folder_state = describe_state(self.runner.runs_dir / planned.name)
                lines.append(f"\n{planned.name} ({folder_state})")
                lines.append(shlex.join(self.runner.command(planned)))
        return "\n".join(lines)

    def subjects(self) -> Sequence[Subject]:
        """Return the planned runs as subjects, all with the status "waiting"."""
        waiting = {"status": WAITING, "exit_code": None, "error": None}
        return [
            Subject(planned.name, planned.variant, seed=planned.seed, about=waiting)
            for planned in self.plan.runs
        ]

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """Train the runs that are not finished; print failures, and set the exit code 1 for them.

        Returns:
            All planned runs with their outcomes.
        """
        runs_dir = self.runner.runs_dir
        missing = self.missing_runs()
        outcomes = self.runner.run_all(missing) if missing else []
        trained = {outcome.run: subject_of(runs_dir, outcome) for outcome in outcomes}
        self.require_metric(list(trained.values()))
        failures = [outcome for outcome in outcomes if outcome.status != FINISHED]
        if failures:
            reasons = []
            for outcome in failures:
                reasons.append(f"{outcome.run} (exit code {outcome.exit_code}: {outcome.error})")
            print(
                f"error: {len(failures)} of {len(outcomes)} runs failed: {'; '.join(reasons)}."
                f" Their logs are {runs_dir}/RUN.log. Run the same command to try them again.",
                file=sys.stderr,
            )
            self.exit_code = 1
        return [trained.get(subject.label, subject) for subject in subjects]

    def missing_runs(self) -> Sequence[Run]:
        """Return the planned runs that must be finished before the comparison."""
        return self.plan.runs

    def require_metric(self, subjects: Sequence[Subject]) -> None:
        """Raise UserError if the runs have recorded metrics, but not the experiment's metric."""
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
        metric = self.experiment.metric
        names = dict.fromkeys((metric, TRAINING_GRID_LOSS))  # both may be the same metric
        measured, seconds = [], []
        for line in subject.log():
            if line.get("seconds") is not None:
                seconds.append(line["seconds"])
            # The metric and the training loss are compared at steps that have the metric.
            if metric in line:
                measured.append(line)
        curve = []
        for line in measured:
            for name in names:
                if name in line:
                    curve.append(subject.row(name, line[name], step=line["step"]))
        yield from curve
        yield from compare.best(curve, metric, self.experiment.higher_is_better)
        if subject.best_step is not None:
            measured = [line for line in measured if line["step"] <= subject.best_step]
        if measured:
            for name in names:
                yield subject.row(f"final {name}", measured[-1].get(name))
        # The median, because the first step may be slow.
        if seconds:
            yield subject.row(SECONDS, statistics.median(seconds))

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        metric, control = self.experiment.metric, self.plan.control
        pairs = self.pairs(subjects)
        unpaired = [group for group, is_paired in pairs.items() if is_paired is False]
        # A variant that learns less also overfits less; at equal training loss, this has no effect.
        common_loss, equal_rows = compare.equal_training(rows, metric, TRAINING_GRID_LOSS, unpaired)
        rows += equal_rows
        lines = compare.summaries(rows, control, unpaired=unpaired)
        self.settings["paired"] = pairs
        self.settings["equal_training"] = None if common_loss is None else asdict(common_loss)
        result = self.result(subjects, rows, lines, control)
        self.notes += losses.notes(result)
        return replace(result, metrics=losses.metrics(result))

    def pairs(self, subjects: Sequence[Subject]) -> dict[str, bool | None]:
        """Return for each variant whether its finished runs saw the control's inputs.

        See `check_pairing`. The result is {} if the control has no finished run.
        """
        finished = [subject for subject in subjects if subject.finished]
        if self.plan.control not in by_group(finished):
            return {}
        return check_pairing(finished, self.plan.control)

    def draw_figures(self, result: Result, folder: Path) -> list[str]:
        size = (12, max(3.6, 0.34 * len(result.groups) + 1.6))
        row = losses.panels(result)
        plot.panels(result, folder / FIGURE, [row], control=result.control, figsize=size)
        return [FIGURE]

    def introduction(self, result: Result) -> str:
        return losses.introduction(result)

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        columns = []
        for figure in losses.KEY_FIGURES:
            name = f"{figure} {result.settings['metric']}"
            columns.append(Column(name, difference=True, interval=False))
        columns.append(Column(f"final {TRAINING_GRID_LOSS}", interval=False))
        columns.append(Column(SECONDS, interval=False))
        return {"": columns}

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        return {"seeds": lambda group: losses.count_finished(result, group)}


def shown_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a variant's options without machine paths."""
    options = {}
    for name, value in values.items():
        options[name] = without_paths(value) if isinstance(value, str) else value
    return options


def subject_of(runs_dir: Path, outcome: Outcome) -> Subject:
    """Return a run as a subject; if the run is not finished, the subject has only the outcome."""
    about = {"status": outcome.status, "exit_code": outcome.exit_code, "error": outcome.error}
    if outcome.status == FINISHED:
        subject = open_run(runs_dir / outcome.run, outcome.run)
        return replace(subject, group=outcome.variant, about=about)
    name = outcome.run
    return Subject(name, outcome.variant, source=name, seed=outcome.seed, about=about)
