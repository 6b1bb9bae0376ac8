"""Train a grid of variants and seeds, and compare them with a control, paired by seed.

    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0..4
    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0..4 rho=0.01,0.05,0.1 \\
        --control method=lora --output_dir results/rho
    python -m eval.sweep recipes/mini.yaml --arms arms.yaml --over seed=0..4
    python -m eval.sweep recipes/mini.yaml --over method=lora,bilora seed=0,1 \\
        --set max_train_steps=2 num_validation_images=0 --runs_dir runs/try   # minutes on a CPU

``arms.yaml`` maps labels to options, for comparisons that are no product:

    lora: {method: lora}
    lora + EMA: {method: lora, use_ema: true}

Every cell is checked by the training script's own parser before the first one runs. A finished cell
is not repeated and an interrupted one goes on, so the same command can be given again at any time.
Writes rows.csv, summary.csv, result.json, report.md and sweep.png.
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
from bilora_diffusion.core.values import WORKERS

from .. import compare, plot
from ..command import Parser, open_folder, require_free
from ..evaluation import Evaluation
from ..provenance import without_paths
from ..report import Column
from ..sources import run as find_run
from ..subjects import Subject, by_group, paired
from ..table import Result, Row
from . import reporting
from .reporting import FINISHED, HELDOUT, SECONDS, TRAINING

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from .axes import Values
    from .cells import Outcome, Runner
    from .grid import Grid


@dataclass(frozen=True)
class SweepOptions:
    """Flags of the command."""

    section = "sweep"
    over: list[str] = option(  # noqa: RUF009
        [],
        "Axes: name=v1,v2 or name=a..b (whole numbers, b included); seed is the axis of pairs.",
    )
    arms: Path | None = option(None, "YAML file: label to mapping of options.")  # noqa: RUF009
    set: list[str] = option([], "Options of all runs, NAME=VALUE.")  # noqa: RUF009
    control: str | None = option(None, "Label of the variant to compare with (default: first).")
    metric: str = option(HELDOUT, "Key in metrics.jsonl.")
    higher_is_better: bool = option(False, "Of the metric, such as accuracy.")
    runs_dir: Path = option(Path("runs", "sweep"), "Folder of the run folders.")  # noqa: RUF009
    script: str = option("train_dreambooth_bilora.py", "The training script.")
    jobs: int = option(1, "Runs at a time, which share the cores.", range=WORKERS)
    dry_run: bool = option(False, "Check and list the runs only.")


class Sweep(Evaluation):
    """The metric and the training loss of each finished cell over training, and key figures.

    A subject is a run, a group a variant; ``about`` of a subject says what became of it: ``status``
    (finished, failed or waiting), ``exit_code`` and ``error``.

    ``settings``: ``recipe``, ``metric``, ``higher_is_better``, ``seeds``; ``arms``, by label their
    ``options`` and the labels that turned out to be the same run (``also``); ``paired``, whether
    a variant's runs saw the control's inputs; ``equal_training``, the training loss at which
    variants are compared and the one that sets it, or None.
    """

    name, options = "sweep", (SweepOptions,)

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        args.output_dir = args.output_dir or args.runs_dir / self.name
        super().__init__(args, command)

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        help = "YAML file of options that all runs share"
        parser.add_argument("recipe", type=Path, help=help)
        help = f"default: {cls.name}, in --runs_dir"
        parser.add_argument("--output_dir", type=Path, help=help)

    def work(self) -> int | None:
        """Plan, run, compare and write; 1 when a cell failed."""
        grid, runner = self.plan()
        runs = runner.runs_dir
        if self.args.dry_run:
            show(grid, runner)
            return None
        open_folder(runs, "--runs_dir")
        open_folder(self.folder)
        require_free(self.folder, self.name)
        outcomes = runner.run_all(grid.cells)
        subjects = [subject_of(runs, outcome) for outcome in outcomes]
        self._require_metric(subjects)
        rows = [row for subject in subjects for row in self.rows(subject)]
        self.write(self.complete(subjects, rows))
        return report_failures(outcomes, runs)

    def plan(self) -> tuple[Grid, Runner]:
        """Check and print the runs; returns them with what runs them."""
        from . import axes
        from .cells import Runner
        from .grid import Planner, open_script

        given = self.args
        if not given.recipe.is_file():
            raise UserError(f'there is no recipe "{given.recipe}": correct the first argument.')
        script, shared = open_script(given.script), axes.settings(given.set, "--set")
        planner = Planner(given.recipe, script, shared, given.metric)
        variants = axes.load_variants(given.arms) if given.arms else {}
        grid = planner.grid(axes.axes(given.over), variants)
        self.control = grid.control(given.control).label
        print(f"{len(grid.variants)} variants x {len(grid.seeds)} seeds = {len(grid.cells)} runs")
        for variant in grid.variants:
            note = " (control)" if variant.label == self.control else ""
            also = f" (the same run: {', '.join(variant.also)})" if variant.also else ""
            print(f"  {variant.label}{note}{also}")
        self.settings |= {
            "recipe": given.recipe.name,
            "metric": given.metric,
            "higher_is_better": given.higher_is_better,
            "seeds": list(grid.seeds),
            "arms": {
                one.label: {"also": list(one.also), "options": shown_options(one.values)}
                for one in grid.variants
            },
        }
        return grid, Runner(script, given.recipe, given.runs_dir, given.jobs)

    def _require_metric(self, subjects: Sequence[Subject]) -> None:
        lines = [line for subject in subjects for line in subject.log()]
        values = [pair for line in lines for pair in line.items()]
        known = {name for name, value in values if isinstance(value, int | float)} - {"step"}
        if lines and self.args.metric not in known:
            hint = did_you_mean(self.args.metric, known)
            raise UserError(
                f'no run has the metric "{self.args.metric}"{hint}: use --metric with one of'
                f" {', '.join(sorted(known))}."
            )

    def rows(self, subject: Subject) -> Iterator[Row]:
        metric, lines = self.args.metric, subject.log()
        names = dict.fromkeys((metric, TRAINING))
        measured = [line for line in lines if metric in line]
        for line in measured:
            for name in names:
                if name in line:
                    yield subject.row(name, line[name], step=line["step"])
        for name in names if measured else ():
            yield subject.row(f"final {name}", measured[-1].get(name))
        seconds = [line["seconds"] for line in lines if line.get("seconds") is not None]
        if seconds:
            yield subject.row(SECONDS, statistics.median(seconds))

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        metric, higher = self.args.metric, self.args.higher_is_better
        finished = [subject for subject in subjects if subject.finished]
        there = self.control in by_group(finished)
        pairs = paired(finished, self.control) if there else {}
        unpaired = [group for group, same in pairs.items() if same is False]
        level, equal = compare.equal_training(rows, metric, TRAINING, unpaired)
        rows += [*compare.best(rows, metric, higher), *equal]
        lines = compare.summaries(rows, self.control, unpaired=unpaired)
        self.settings["paired"] = pairs
        self.settings["equal_training"] = None if level is None else asdict(level)
        result = self.result(subjects, rows, lines, self.control)
        self.notes += reporting.notes(result)
        return replace(result, metrics=reporting.metrics(result))

    def figures(self, result: Result, folder: Path) -> list[str]:
        size = {"figsize": (12, max(3.6, 0.34 * len(result.groups) + 1.6))}
        row = reporting.panels(result)
        plot.panels(result, folder / "sweep.png", [row], control=result.control, **size)
        return ["sweep.png"]

    def introduction(self, result: Result) -> str:
        return reporting.introduction(result)

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        name = result.settings["metric"]
        figures = [Column(f"{what} {name}", "", True, False) for what in reporting.KEY_FIGURES]
        others = [Column(own, interval=False) for own in (f"final {TRAINING}", SECONDS)]
        return {"": [*figures, *others]}

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        return {"seeds": lambda group: reporting.finished(result, group)}


def show(grid: Grid, runner: Runner) -> None:
    """Print the command line of each cell, and what its folder holds."""
    from .cells import state

    for cell in grid.cells:
        print(f"\n{cell.name} ({state(runner.runs_dir / cell.name)})")
        print(shlex.join(runner.command(cell)))


def shown_options(values: Values) -> dict[str, Any]:
    """A variant's options without machine paths."""
    return {
        name: without_paths(value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def subject_of(runs_dir: Path, outcome: Outcome) -> Subject:
    """A cell; one that is not finished has nothing but what became of it."""
    facts = {"status": outcome.status, "exit_code": outcome.exit_code, "error": outcome.error}
    if outcome.status == FINISHED:
        run = find_run(runs_dir / outcome.cell, outcome.cell)
        return replace(run, group=outcome.arm, about=facts)
    cell, variant, seed = outcome.cell, outcome.arm, outcome.seed
    return Subject(cell, variant, source=cell, seed=seed, about=facts)


def report_failures(outcomes: Sequence[Outcome], runs_dir: Path) -> int:
    """The exit code, after a sentence for what failed."""
    failed = [outcome for outcome in outcomes if outcome.status != FINISHED]
    if failed:
        reasons = "; ".join(f"{o.cell} (exit code {o.exit_code}: {o.error})" for o in failed)
        print(
            f"error: {len(failed)} of {len(outcomes)} runs failed: {reasons}. Their logs are"
            f" {runs_dir}/<cell>.log, and the same command tries them again.",
            file=sys.stderr,
        )
    return int(bool(failed))


main = Sweep.main
