"""What a sweep found: its run folders measured, summed up over seeds and compared pairwise."""

from __future__ import annotations

import statistics as stdlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bilora_diffusion.run import runlog

from .cells import Outcome
from .grid import Arm, Grid
from .provenance import Provenance, of_runs, without_paths
from .runs import Run, paired, read, require_metric
from .statistics import (
    Paired,
    at_training_loss,
    mean,
    mean_and_error,
    paired_difference,
    reached_training_loss,
)


@dataclass(frozen=True)
class Point:
    """The metric at a step: mean and standard error over an arm's seeds."""

    step: int
    mean: float
    error: float


@dataclass(frozen=True)
class Summary:
    """One figure of an arm: mean over its seeds, and paired difference to the control's.

    ``difference`` is None for the control, for an arm that is not paired, and where no seed has
    both.
    """

    mean: float | None
    difference: Paired | None


@dataclass(frozen=True)
class ArmResult:
    """One row of the table.

    Args:
        label, also, options: see ``grid.Arm``.
        paired: whether its runs saw the control's inputs, seed by seed; None for the control and
            where no seed has both.
        seeds, missing: those that are finished, and those that are not.
        final: the metric at the last measurement.
        best: its best value over training.
        equal_training: the metric where the training loss has fallen to ``EqualTraining``'s.
        final_training_loss: ``train_grid_loss`` at the last measurement, mean over seeds.
        seconds_per_step: median over a run's steps, mean over seeds.
        curve: the metric over training.
    """

    label: str
    also: list[str]
    options: dict[str, Any]
    paired: bool | None
    seeds: list[int]
    missing: list[int]
    final: Summary
    best: Summary
    equal_training: Summary
    final_training_loss: float | None
    seconds_per_step: float | None
    curve: list[Point]


@dataclass(frozen=True)
class EqualTraining:
    """The training loss at which arms are compared: the lowest that all of their runs reach.

    Args:
        training_loss: ``train_grid_loss``.
        set_by: the arm whose run got no lower.
    """

    training_loss: float
    set_by: str


@dataclass(frozen=True)
class CellResult:
    """One run: what became of it, and its figures (None where it is not finished)."""

    cell: str
    arm: str
    seed: int
    status: str
    exit_code: int | None
    error: str | None
    final: float | None
    best: float | None
    equal_training: float | None
    final_training_loss: float | None
    seconds_per_step: float | None


@dataclass(frozen=True)
class SweepResult:
    """The whole result; ``sweep.json`` is this as JSON, with its version."""

    recipe: str
    metric: str
    higher_is_better: bool
    control: str
    seeds: list[int]
    equal_training: EqualTraining | None
    arms: list[ArmResult]
    cells: list[CellResult]
    provenance: Provenance | None


def equal_training(runs: Mapping[str, Mapping[int, Run]]) -> EqualTraining | None:
    """The lowest training loss that every run reaches; None without one.

    An arm in which a run's training loss never fell below its start is left aside: it would take
    all others back to the start.
    """
    lowest: list[tuple[float, str]] = []
    for label, own in runs.items():
        reached = [reached_training_loss(run.both()[0]) for run in own.values()]
        found = [value for value in reached if value is not None]
        if len(found) == len(reached):
            lowest += [(value, label) for value in found]
    return EqualTraining(*max(lowest)) if lowest else None


@dataclass(frozen=True)
class _Comparison:
    """What every row needs."""

    runs: Mapping[str, Mapping[int, Run]]
    control: str
    higher_is_better: bool
    pairs: Mapping[str, bool | None]
    level: EqualTraining | None

    def figures(self, run: Run, label: str) -> dict[str, Any]:
        """The figures of one run."""
        at_level = None
        if self.level is not None and self.pairs[label] is not False:
            at_level = at_training_loss(*run.both(), self.level.training_loss)
        final, training = run.last
        return {
            "final": final,
            "best": run.best(self.higher_is_better),
            "equal_training": at_level,
            "final_training_loss": training,
            "seconds_per_step": stdlib.median(run.seconds) if run.seconds else None,
        }

    def values(self, label: str, name: str) -> dict[int, float]:
        """One figure of an arm by seed, where it is known."""
        found = {seed: self.figures(r, label)[name] for seed, r in self.runs[label].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def summary(self, label: str, name: str) -> Summary:
        """One figure of an arm over seeds."""
        own, difference = self.values(label, name), None
        if label != self.control and self.pairs[label]:
            difference = paired_difference(
                own, self.values(self.control, name), higher_is_better=self.higher_is_better
            )
        return Summary(mean(list(own.values())), difference)

    def row(self, arm: Arm, seeds: Sequence[int]) -> ArmResult:
        """The row of an arm."""
        own = self.runs[arm.label]
        return ArmResult(
            label=arm.label,
            also=list(arm.also),
            options={
                name: without_paths(value) if isinstance(value, str) else value
                for name, value in arm.values.items()
            },
            paired=self.pairs[arm.label],
            seeds=sorted(own),
            missing=[seed for seed in seeds if seed not in own],
            final=self.summary(arm.label, "final"),
            best=self.summary(arm.label, "best"),
            equal_training=self.summary(arm.label, "equal_training"),
            final_training_loss=self.summary(arm.label, "final_training_loss").mean,
            seconds_per_step=self.summary(arm.label, "seconds_per_step").mean,
            curve=_curve(list(own.values())),
        )


def compare(
    grid: Grid,
    outcomes: Sequence[Outcome],
    runs_dir: Path,
    *,
    control: str,
    metric: str,
    higher_is_better: bool,
    recipe: Path,
    command: str,
) -> SweepResult:
    """Measure the finished cells and compare the arms with the control.

    Args:
        grid: what was to be run.
        outcomes: what became of each cell, in any order.
        runs_dir: where the run folders lie.
        control: label of the control arm.
        metric: key in ``metrics.jsonl``.
        higher_is_better: of the metric.
        recipe: of all cells, for the record.
        command: for the provenance, without machine paths.

    Raises:
        UserError: a run folder is damaged, or none has the metric.
    """
    runs: dict[str, dict[int, Run]] = {arm.label: {} for arm in grid.arms}
    finished = [outcome for outcome in outcomes if outcome.status == "finished"]
    require_metric([runs_dir / outcome.cell for outcome in finished], metric)
    for outcome in finished:
        runs[outcome.arm][outcome.seed] = read(runs_dir / outcome.cell, metric)
    pairs = {
        label: None if label == control else paired(own, runs[control])
        for label, own in runs.items()
    }
    comparable = {label: own for label, own in runs.items() if own and pairs[label] is not False}
    comparison = _Comparison(runs, control, higher_is_better, pairs, equal_training(comparable))
    records = [runlog.read_run(runs_dir / outcome.cell) for outcome in finished]
    return SweepResult(
        recipe=recipe.name,
        metric=metric,
        higher_is_better=higher_is_better,
        control=control,
        seeds=list(grid.seeds),
        equal_training=comparison.level,
        arms=[comparison.row(arm, grid.seeds) for arm in grid.arms],
        cells=[_cell(outcome, comparison) for outcome in outcomes],
        provenance=of_runs(command, records) if records else None,
    )


def _cell(outcome: Outcome, comparison: _Comparison) -> CellResult:
    run = comparison.runs[outcome.arm].get(outcome.seed) or Run([], {}, [])
    return CellResult(**asdict(outcome), **comparison.figures(run, outcome.arm))


def _curve(runs: Sequence[Run]) -> list[Point]:
    """The metric at the steps at which all runs of an arm have it."""
    values = [{step: v for step, v, _ in run.curve if v is not None} for run in runs]
    steps = sorted(set.intersection(*(set(own) for own in values))) if values else []
    points = []
    for step in steps:
        found = mean_and_error([own[step] for own in values])
        points += [Point(step, *found)] if found else []
    return points
