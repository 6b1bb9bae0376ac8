"""Tune each method with the same budget on one half of the held-out set, judge it on the other.

    python -m eval.tune recipes/mini.yaml --space eval/spaces/mini.yaml --jobs 2
    python -m eval.tune recipes/mini.yaml --space eval/spaces/mini.yaml --trials 2 --seeds 0 \\
        --test_seeds 1,2 --set max_train_steps=20 validation_loss_steps=10   # minutes on a CPU

Random search (or a grid, where the space has one): for each method of the space ``--trials``
configurations, trained with each of ``--seeds`` and measured on the first half
(``--validation_part 1/2``). The number of steps is not drawn but read from the curves: a method's
choice is the trial and the step at which the mean over the seeds is lowest. It is then trained anew
with ``--test_seeds`` and measured on the second half, at the chosen step and at each run's own best
one, paired by seed with the control.

Every trial is checked by the training script's own parser before the first one runs. A finished run
is not repeated and an interrupted one goes on, so the same command can be given again at any time.
Writes rows.csv, summary.csv, result.json, report.md and tune.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_diffusion.errors import UserError

from ..command import Parser
from ..subjects import Subject
from ..sweep import Sweep, report_failures, show, shown_options, subject_of
from ..sweep.findings import FINISHED, HELDOUT, SECONDS
from ..table import Result, Row
from . import findings
from .findings import CHOSEN, RELATIVE, TO_CHOSEN, TRIAL

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from ..sweep.cells import Outcome
    from ..sweep.grid import Grid, Planner
    from .choice import Choice
    from .spaces import Space

CONSTANT = ("lr_scheduler",)
"""What has to be "constant": otherwise the end of a short run is no step of a long one."""
TRIALS_DRAWN = 16
"""Of each method, where no grid says how many."""
TRIALS, TESTS = "trials", "tests"
"""Folders of the runs."""


class Tune(Sweep):
    """Each method's curve over training on the test half, and key figures at the chosen step.

    A subject is a test run, a group a method; rows of trials have the metric "trial heldout_loss"
    and the trial's number as item.

    ``settings``: those of a sweep, of the test runs; ``trials``, by method the options of each
    trial, in order; ``chosen``, by method ``trial``, ``step`` and ``loss`` on the first half;
    ``trial_seeds``, ``search_seed``, ``parts``.
    """

    name = "tune"

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        super().__init__(args, command)
        args.metric, args.higher_is_better = HELDOUT, False
        self.choices: dict[str, Choice] = {}
        self.trial_rows: list[Row] = []

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        cls.running_arguments(parser)
        add = parser.add_argument
        add("--space", type=Path, required=True, help="YAML file of what is searched")
        add("--methods", metavar="LABELS", help="of the space, comma-separated; default: all")
        add("--trials", type=int, help="configurations of each method; default: 16, or the grid's")
        add("--seeds", default="0,1", metavar="VALUES", help="of each trial: v1,v2 or a..b")
        add("--test_seeds", default="2..6", metavar="VALUES", help="others, to judge with")
        add("--search_seed", type=int, default=0, help="of the draws")
        add("--parts", default="1/2,2/2", help="of the held-out set: to choose by, to judge by")

    def work(self) -> int | None:
        """Search, choose, judge and write; 1 when a run failed that should not have."""
        space, seeds, test_seeds, parts = self.read()
        planner = self.planner(**space.options, validation_part=parts[0])
        grid, arms = self.trials(space, planner, seeds)
        runner = self.runner(planner, self.args.runs_dir / TRIALS)
        if self.args.dry_run:
            show(grid, runner)
            return None
        self.open_folders(runner.runs_dir)
        outcomes = runner.run_all(grid.cells)
        if any((one.exit_code or 0) < 0 for one in outcomes):  # killed, whatever it was to learn
            return report_failures(outcomes, runner.runs_dir)
        self.choose(space, arms, outcomes, seeds)
        judge = replace(planner, shared={**planner.shared, "validation_part": parts[1]})
        chosen = {
            method: space.configuration(method, self.args.search_seed, choice.trial)
            for method, choice in self.choices.items()
        }
        tests = judge.grid({"seed": test_seeds}, chosen)
        self.control = tests.control(self.args.control).label
        self.describe(tests)
        runner = self.runner(judge, self.args.runs_dir / TESTS)
        self.open_folders(runner.runs_dir)
        return self.judge(runner.run_all(tests.cells), runner.runs_dir)

    def read(self) -> tuple[Space, list[str], list[str], list[str]]:
        """The space, the seeds of trials and tests, and the two parts.

        Raises:
            UserError: bad input.
        """
        from bilora_diffusion.run.heldout_part import read_part

        from ..sweep.axes import listed, settings
        from .spaces import load

        given = self.args
        seeds = listed(given.seeds, f'--seeds is "{given.seeds}"')
        tests = listed(given.test_seeds, f'--test_seeds is "{given.test_seeds}"')
        if both := [seed for seed in tests if seed in seeds]:
            raise UserError(f"seed {both[0]} is among --seeds and --test_seeds: give fresh ones.")
        if given.trials is not None and given.trials < 1:
            raise UserError(f"--trials is {given.trials}: give 1 or more.")
        parts = listed(given.parts, f'--parts is "{given.parts}"')
        counts = {read_part(part)[1] for part in parts}
        if len(parts) != 2 or len(counts) != 1:
            raise UserError(
                f'--parts is "{given.parts}": give two parts of one split, such as 1/2,2/2.'
            )
        if "validation_part" in settings(given.set, "--set"):
            raise UserError('--set has "validation_part", which --parts says: leave it out.')
        self.settings["parts"] = parts
        space = load(given.space)
        if given.methods is not None:
            space = space.of(listed(given.methods, f'--methods is "{given.methods}"'))
        size = space.grid_size(f'--space "{given.space}"')
        if given.trials is None:
            given.trials = size or TRIALS_DRAWN
        elif size is not None and given.trials != size:
            raise UserError(f"--trials is {given.trials}, and the grid has {size}: leave it out.")
        return space, seeds, tests, parts

    def trials(
        self, space: Space, planner: Planner, seeds: Sequence[str]
    ) -> tuple[Grid, dict[str, list[tuple[str, int]]]]:
        """The cells of all trials, checked, and which trials of which method each arm stands for.

        Raises:
            UserError: the script would refuse one, or its steps could not be read from its curve.
        """
        numbers = range(1, self.args.trials + 1)
        drawn = {
            method: [space.configuration(method, self.args.search_seed, n) for n in numbers]
            for method in space.methods
        }
        labels = {f"{method} {n}": (method, n) for method in drawn for n in numbers}
        if self.args.control is not None and self.args.control not in drawn:
            raise UserError(
                f'--control is "{self.args.control}", which the space does not name: use one of'
                f" {', '.join(drawn)}."
            )
        arms = {label: drawn[method][n - 1] for label, (method, n) in labels.items()}
        grid = planner.grid({"seed": seeds}, arms)
        for arm in grid.arms:
            _require_readable(arm.label, planner.read(arm.label, arm.values, None)[0])
        self.settings |= {
            "trials": {method: list(map(shown_options, own)) for method, own in drawn.items()},
            "trial_seeds": list(map(int, seeds)),
            "search_seed": self.args.search_seed,
        }
        print(f"{len(drawn)} methods x {len(numbers)} trials: {len(grid.cells)} runs to choose by")
        return grid, {arm.label: [labels[name] for name in (arm.label, *arm.also)]
                      for arm in grid.arms}  # fmt: skip

    def choose(
        self,
        space: Space,
        arms: Mapping[str, Sequence[tuple[str, int]]],
        outcomes: Sequence[Outcome],
        seeds: Sequence[str],
    ) -> None:
        """Read the trials' curves, and keep each method's choice.

        Raises:
            UserError: no trial of a method got through with all seeds.
        """
        from . import choice

        runs = self.args.runs_dir / TRIALS
        for outcome in outcomes:
            subject = subject_of(runs, outcome)
            lines = [(line["step"], line[HELDOUT]) for line in subject.log() if HELDOUT in line]
            for method, number in arms[outcome.arm]:
                own = replace(subject, group=method)
                self.trial_rows += [
                    own.row(TRIAL, value, item=str(number), step=step) for step, value in lines
                ]
        failed = [one for one in outcomes if one.status != FINISHED]
        self.notes += [f"Failed, and so not chosen: {one.cell}: {one.error}" for one in failed]
        for method in space.methods:
            rows = [row for row in self.trial_rows if row.group == method]
            found = choice.choose(choice.curves(rows, list(map(int, seeds))))
            if found is None:
                raise UserError(
                    f"no trial of {method} has a {HELDOUT} with all of --seeds: look into"
                    f" {runs}/*.log."
                )
            self.choices[method] = found
        self.settings["chosen"] = {method: asdict(one) for method, one in self.choices.items()}

    def rows(self, subject: Subject) -> Iterator[Row]:
        rows = list(super().rows(subject))
        yield from rows
        step = self.choices[subject.group].step
        at = [row.value for row in rows if (row.metric, row.step) == (HELDOUT, step)]
        yield from (subject.row(CHOSEN, value) for value in at)
        seconds = [row.value for row in rows if row.metric == SECONDS and row.value is not None]
        yield from (subject.row(TO_CHOSEN, step * value) for value in seconds)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        from .. import compare

        rows += _relative(rows, self.control)
        result = super().complete(subjects, rows)
        return replace(
            result,
            metrics=findings.metrics(result),
            rows=[*self.trial_rows, *result.rows],
            summaries=[*compare.summaries(self.trial_rows), *result.summaries],
        )

    def figures(self, result: Result, folder: Path) -> list[str]:
        from . import figures

        figures.draw(result, folder / "tune.png")
        return ["tune.png"]

    def report(self, result: Result) -> str:
        return findings.report(result)


def _relative(rows: Sequence[Row], control: str) -> list[Row]:
    """Seconds per step as multiples of the control's with the same seed."""
    seconds = [row for row in rows if row.metric == SECONDS]
    units = {row.seed: row.value for row in seconds if row.group == control and row.value}
    return [
        replace(row, metric=RELATIVE, value=row.value / unit)
        for row in seconds
        if row.value is not None and (unit := units.get(row.seed))
    ]


def _require_readable(label: str, config: Any) -> None:
    """Refuse runs in whose curve a shorter run can't be seen.

    Raises:
        UserError: the loss is not measured on the way, or something changes over the whole run.
    """
    if not config.validation_loss_steps:
        raise UserError(
            f'"{label}" would measure its held-out loss at the end only: say how often by --set'
            " validation_loss_steps=25."
        )
    for name in CONSTANT:
        if (value := getattr(config, name)) != "constant":
            raise UserError(
                f'"{label}" has {name}={value}, under which a step of a long run is no end of a'
                f" short one: use --set {name}=constant."
            )


main = Tune.main
