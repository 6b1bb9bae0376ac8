"""Train a grid of arms and seeds, and compare the arms with a control, paired by seed.

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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_diffusion.errors import UserError, did_you_mean

from ..command import Parser, open_folder, require_free
from ..evaluation import Evaluation
from ..provenance import without_paths
from ..sources import run as find_run
from ..subjects import Subject, by_group, paired
from ..table import Result, Row
from . import findings
from .findings import FINISHED, HELDOUT, SECONDS, TRAINING

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from .cells import Outcome, Runner
    from .grid import Grid


class Sweep(Evaluation):
    """The metric and the training loss of each finished cell over training, and key figures.

    A subject is a cell, a group an arm; ``about`` of a subject says what became of it: ``status``
    (finished, failed or waiting), ``exit_code`` and ``error``.

    ``settings``: ``recipe``, ``metric``, ``higher_is_better``, ``seeds``; ``arms``, by label their
    ``options`` and the labels that turned out to be the same run (``also``); ``paired``, whether
    an arm's runs saw the control's inputs; ``equal_training``, the training loss at which arms are
    compared and the arm that sets it, or None.
    """

    name = "sweep"

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        args.output_dir = args.output_dir or args.runs_dir / self.name
        super().__init__(args, command)

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        add = parser.add_argument
        add("recipe", type=Path, help="YAML file of options that all cells share")
        add(
            "--over",
            nargs="+",
            default=[],
            metavar="NAME=VALUES",
            help="axes: name=v1,v2 or name=a..b (whole numbers, b included); seed is the axis of"
            " pairs",
        )
        add("--arms", type=Path, help="YAML file: label to mapping of options")
        add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of all cells")
        add("--control", help="the arm to compare with, by label or option; default: the first")
        add("--metric", default=HELDOUT, help="key in metrics.jsonl")
        add("--higher_is_better", action="store_true", help="of the metric, such as accuracy")
        add("--output_dir", type=Path, help="default: sweep, in --runs_dir")
        add("--runs_dir", type=Path, default=Path("runs/sweep"))
        add(
            "--launch",
            default="",
            metavar="ARGUMENTS",
            help='for accelerate launch, such as --launch="--num_processes 2 --multi_gpu"',
        )
        add("--script", default="train_dreambooth_bilora.py", help="the training script")
        add("--dry_run", action="store_true", help="check and list the cells only")

    def work(self) -> int | None:
        """Plan, run, compare and write; 1 when a cell failed."""
        from . import cells

        grid, runner = self.plan()
        if self.args.dry_run:
            for cell in grid.cells:
                print(f"\n{cell.name} ({cells.state(self.args.runs_dir / cell.name)})")
                print(shlex.join(runner.command(cell)))
            return None
        open_folder(self.args.runs_dir, "--runs_dir")
        open_folder(self.folder)
        require_free(self.folder, self.name)
        outcomes = runner.run_all(grid.cells)
        subjects = [_subject(self.args.runs_dir, outcome) for outcome in outcomes]
        self._require_metric(subjects)
        rows = [row for subject in subjects for row in self.rows(subject)]
        self.write(self.complete(subjects, rows))
        return _report_failures(outcomes, self.args.runs_dir)

    def plan(self) -> tuple[Grid, Runner]:
        """What is to be run, checked and shown.

        Raises:
            UserError: bad input; nothing was run.
        """
        from . import axes, cells
        from .grid import Planner, open_script

        given, launch = self.args, shlex.split(self.args.launch)
        if not given.recipe.is_file():
            raise UserError(f'there is no recipe "{given.recipe}": correct the first argument.')
        script = open_script(given.script)
        shared = axes.settings(given.set, "--set")
        planner = Planner(given.recipe, script, shared, launch, given.metric)
        arms = axes.load_arms(given.arms) if given.arms else {}
        grid = planner.grid(axes.axes(given.over), arms)
        self.control = grid.control(given.control).label
        print(f"{len(grid.arms)} arms x {len(grid.seeds)} seeds = {len(grid.cells)} cells")
        for arm in grid.arms:
            note = " (control)" if arm.label == self.control else ""
            also = f" (the same run: {', '.join(arm.also)})" if arm.also else ""
            print(f"  {arm.label}{note}{also}")
        self.settings |= {
            "recipe": given.recipe.name,
            "metric": given.metric,
            "higher_is_better": given.higher_is_better,
            "seeds": list(grid.seeds),
            "arms": {
                arm.label: {
                    "also": list(arm.also),
                    "options": {
                        name: without_paths(value) if isinstance(value, str) else value
                        for name, value in arm.values.items()
                    },
                }
                for arm in grid.arms
            },
        }
        return grid, cells.Runner(script, given.recipe, given.runs_dir, launch)

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
        from .. import compare

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
        self.notes += findings.notes(result)
        return replace(result, metrics=findings.metrics(result))

    def figures(self, result: Result, folder: Path) -> list[str]:
        from . import figures

        figures.draw(result, folder / "sweep.png")
        return ["sweep.png"]

    def report(self, result: Result) -> str:
        return findings.report(result)


def _subject(runs_dir: Path, outcome: Outcome) -> Subject:
    """A cell; one that is not finished has nothing but what became of it."""
    facts = {"status": outcome.status, "exit_code": outcome.exit_code, "error": outcome.error}
    if outcome.status == FINISHED:
        run = find_run(runs_dir / outcome.cell, outcome.cell)
        return replace(run, group=outcome.arm, about=facts)
    cell, arm, seed = outcome.cell, outcome.arm, outcome.seed
    return Subject(cell, arm, source=cell, seed=seed, about=facts)


def _report_failures(outcomes: Sequence[Outcome], runs_dir: Path) -> int:
    """The exit code, after a sentence for what failed."""
    failed = [outcome for outcome in outcomes if outcome.status != FINISHED]
    if failed:
        told = "; ".join(f"{o.cell} (exit code {o.exit_code}: {o.error})" for o in failed)
        print(
            f"error: {len(failed)} of {len(outcomes)} cells failed: {told}. Their logs are"
            f" {runs_dir}/<cell>.log, and the same command tries them again.",
            file=sys.stderr,
        )
    return int(bool(failed))


main = Sweep.main
