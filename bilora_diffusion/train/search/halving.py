"""Successive halving over configurations, steps and folds, by paired held-out losses.

All configurations start on the first fold for half of the steps: fewer favour fast rates. Then the
better half goes on again and again: to more steps while its loss still falls, else to the next
fold. A configuration is out where the interval of its difference to the best, paired by held-out
sample, says that it is worse; the others wait, and go on when there are steps left in the budget.
Everything follows from the numbers that are measured: begun anew, it asks for the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from ...core.errors import TrainingError
from ...core.intervals import student_interval
from ...core.seeds import digest_texts
from .space import (
    METHOD,
    RATE,
    Options,
    Space,
)

BUDGET = 10  # runs of the whole length that a search costs at most, unless it is told otherwise
EXPLORED = 0.6  # share of the budget that the first rounds, on one fold, may take
BEYOND = 1.5  # a curve is whole where it goes on for so many times the step of its lowest point
Curve = Mapping[int, np.ndarray]  # step -> held-out loss of each sample, (n,)


class Work(NamedTuple):
    """A run to bring to a number of steps."""

    options: Options
    fold: int
    steps: int


# Trains runs and gives the curve of each, or why it could not go on.
Measure = Callable[[Sequence[Work]], Iterable[Curve | str]]


@dataclass(frozen=True)
class Plan:
    """Size of a search."""

    folds: int  # of the samples; 1 where a held-out set takes their place
    steps: int  # optimizer steps of a run at most
    every: int  # steps from one measurement to the next
    budget: int  # optimizer steps of all runs

    def rounded(self, steps: float) -> int:
        """A number of steps as a multiple of `every`, within the run."""
        return min(self.steps, math.ceil(steps / self.every) * self.every)

    @property
    def first(self) -> int:
        """Steps of the first round."""
        return self.rounded(self.steps / 2)

    def name(self, work: Work) -> str:
        """A name for a run's folder: its values, in letters that every file system knows."""
        name = quote("_".join(value for _, value in work.options) or "as_given", safe="+")
        name = name if len(name) <= 100 else f"{name[:80]}-{digest_texts([name])}"
        return f"{name}_fold{work.fold + 1}" if self.folds > 1 else name


def lowest(curve: Curve) -> tuple[float, int]:
    """The lowest mean of a curve, but for the base model's at step 0, and its first step."""
    return min((float(losses.mean()), step) for step, losses in curve.items() if step > 0)


class Search:
    """A search and all that it measured."""

    def __init__(self, plan: Plan, measure: Measure) -> None:
        self.plan, self._measure = plan, measure
        self.curves: dict[Options, list[Curve]] = {}  # of the folds in order
        self.out: dict[Options, str] = {}  # why a configuration could not go on, or is worse
        self.spent = 0  # optimizer steps

    def expected(self, options: Options, folds: int | None = None) -> Curve:
        """Losses that a run on the whole set is expected to leave on the samples of the first
        ``folds`` of a configuration, or of all, at each step that all of these were measured at.

        It overfits later than a run on a part: by epochs where samples differ, by steps where they
        are alike. So a step's loss is the mean from half way between to it.
        """
        curves = self.curves[options][:folds]
        common = sorted(set.intersection(*map(set, curves)))
        losses = np.array([np.concatenate([curve[step] for curve in curves]) for step in common])
        found = dict(zip(common, losses, strict=True))
        for step in common if self.plan.folds > 1 else ():  # one is the whole set
            between = np.linspace(step * (1 - 0.5 / self.plan.folds), step, 9)
            shares = np.array([[np.interp(between, common, o).mean()] for o in np.eye(len(common))])
            found[step] = (shares * np.where(shares > 0, losses, 0)).sum(0)
        return found

    def run(self, space: Space) -> None:
        """Search a space, and measure the command line as it was given if the budget has room."""
        given = self.plan.steps if self.plan.budget >= 4 * self.plan.steps else 0
        self._explore(space, int(EXPLORED * (self.plan.budget - given)))
        self._narrow(self.plan.budget - given)
        if self.curves and given:
            self._go([Work((), 0, self.plan.steps)], self.plan.budget)

    def _explore(self, space: Space, most: int) -> None:
        def begin(options: Iterable[Options]) -> bool:
            return self._go([Work(one, 0, self.plan.first) for one in options], most)

        most = max(most, len(space.starts()) * self.plan.first)
        every = begin(space.all(most / self.plan.first)) or not begin(space.starts())
        for name in space.axes():
            if not every:
                leaders = self._leaders(space)
                begin(options for start in leaders for options in space.along(name, start))
            while name == RATE and begin(space.beyond(self._leaders(space), self.curves)):
                pass

    def _narrow(self, most: int) -> None:
        size = len(self._ordered())
        while group := self._unfinished():
            size = max(2, math.ceil(size / 2))
            first, *others = (self._next(options) for options in group[:size])
            share = max(sum(map(self._cost, first)), (most - self.spent) // 2)
            works = [*first, *(work for works in others for work in works)]
            if not (self._go(works, min(most, self.spent + share)) or self._go(works, most)):
                return

    def _unfinished(self) -> list[Options]:
        """Configurations that can be brought on, without those that turn out to be worse."""
        ordered = self._ordered()
        for options in ordered[1:]:
            differences, folds = self._differences(options, ordered[0]), len(self.curves[options])
            falls = any(work.fold < folds for work in self._next(options))
            decided = not falls and folds <= len(self.curves[ordered[0]])
            interval = student_interval(differences) if decided else None
            if interval is not None and interval.low > 0:
                gap = differences.mean()
                self.out[options] = "worse by {:.4g} ({:.4g} to {:.4g})".format(gap, *interval)
        return [options for options in ordered if options not in self.out and self._next(options)]

    def _go(self, works: Sequence[Work], most: int) -> bool:
        """Measure what is not measured yet and fits the budget; whether there was any."""
        todo: list[Work] = []
        for work in dict.fromkeys(works):
            cost = self._cost(work)
            if cost and work.options not in self.out and self.spent + cost <= most:
                self.spent += cost
                todo.append(work)
        for work, curve in zip(todo, self._measure(todo), strict=True):
            if isinstance(curve, str):
                self.out[work.options] = curve
                self.spent -= self._cost(work)  # it ended early, if it began at all
            elif not math.isfinite(lowest(curve)[0]):
                self.out[work.options] = "no step has a finite held-out loss"
            else:
                self.curves.setdefault(work.options, [])[work.fold : work.fold + 1] = [curve]
        return bool(todo)

    def _cost(self, work: Work) -> int:
        own = self.curves.get(work.options, [])
        return max(0, work.steps - (max(own[work.fold]) if work.fold < len(own) else 0))

    def _next(self, options: Options) -> list[Work]:
        """Works that bring one on: to more steps, or where its curve is whole to one more fold."""
        curve, count = self.expected(options), len(self.curves[options])
        needed = self.plan.rounded(BEYOND * lowest(curve)[1])
        folds = range(count) if needed > max(curve) else range(count, self.plan.folds)[:1]
        return [Work(options, fold, needed) for fold in folds]

    def _differences(self, options: Options, best: Options, *steps: int) -> np.ndarray:
        """Losses less another's on folds of both, by sample, at given steps or the lowest."""
        count = min(len(self.curves[options]), len(self.curves[best]))
        one, other = (self.expected(o, count) for o in (options, best))
        step, at = steps or (lowest(one)[1], lowest(other)[1])
        return one[step] - other[at]

    def _ordered(self) -> list[Options]:
        """Those not out: the lowest on as many folds as all but one, then by difference to it."""
        alive = [options for options in self.curves if options and options not in self.out]
        folds = sorted(len(self.curves[options]) for options in alive)[-2:][:1]
        enough = [o for o in alive if [len(self.curves[o])] >= folds]
        best = min(enough, key=lambda o: lowest(self.expected(o, folds[0])), default=())
        return sorted(alive, key=lambda o: (o != best, self._differences(o, best).mean()))

    def _leaders(self, space: Space) -> list[Options]:
        """The best configuration of each method, the lowest first; then the starts of methods that
        have none yet, since their starts could not be trained.
        """
        ordered = self._ordered()
        best = {dict(options).get(METHOD): options for options in reversed(ordered)}
        untrained = [start for start in space.starts() if dict(start).get(METHOD) not in best]
        return [*sorted(best.values(), key=ordered.index), *untrained]

    @property
    def chosen(self) -> tuple[Options, int]:
        """The first of all configurations, and its lowest step; a `TrainingError` without any."""
        ordered = self._ordered()
        if not ordered:
            reason = next(iter(self.out.values()), "")
            raise TrainingError(
                f"no configuration could be trained ({reason}): give --fit_space lower rates or"
                " smaller ranks."
            )
        return ordered[0], lowest(self.expected(ordered[0]))[1]

    def standings(self) -> dict[Options, dict[str, Any]]:
        """The choice, then the others by their paired difference to it on the folds of both, those
        on more folds first; last the command line as it was given, at its last step.
        """
        chosen, step = self.chosen
        rows = []
        for options, own in self.curves.items():
            its = lowest(self.expected(options))[1] if options else max(self.expected(options))
            gaps, folds = self._differences(options, chosen, its, step), len(self.curves[chosen])
            row: dict[str, Any] = {"steps": its, "folds": min(len(own), folds)}
            row |= {"difference": float(gaps.mean()), "interval": student_interval(gaps)}
            last = (options != chosen, not options, -row["folds"], row["difference"])
            rows.append((last, options, row))
        return {options: row for _, options, row in sorted(rows, key=lambda r: r[0])}
