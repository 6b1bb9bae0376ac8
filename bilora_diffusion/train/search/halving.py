"""Successive halving over candidates, steps and folds, by paired held-out losses.

All candidates start on the first fold for half of the steps; fewer steps would favour fast rates.
Then the better half is promoted again and again: to more steps while its loss still falls, else to
the next fold. A candidate is dropped if the interval of its difference to the best one, paired by
held-out sample, says that it is worse. The others wait until the budget has steps left for them.
The search is a function of the measured losses, so that a restarted one trains the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from ...core.errors import TrainingError
from ...core.figures import mean_interval
from ...core.seeds import digest_texts
from .space import METHOD, RATE, Candidate, Space

# Default budget of a search, in runs of the whole length.
BUDGET = 10
# Share of the budget that the first rung, on one fold, may take.
EXPLORED_SHARE = 0.6
# A curve is complete if it goes on to this multiple of the step of its lowest point.
MARGIN = 1.5
# Longest name of a run's folder; longer ones are cut.
NAME_LENGTH = 100
# Step -> held-out loss of each sample, (samples,).
Curve = Mapping[int, np.ndarray]


class Trial(NamedTuple):
    """A candidate on a fold, to be trained to a number of steps."""

    candidate: Candidate
    fold: int
    steps: int


# Function that trains runs and gives the curve of each, or the reason why it could not go on.
TrainTrials = Callable[[Sequence[Trial]], Iterable[Curve | str]]


@dataclass(frozen=True)
class Plan:
    """Size of a search.

    Attributes:
        folds: folds of the samples; 1 where a held-out set takes their place.
        steps: optimizer steps of a run at most.
        interval: steps from one measurement to the next.
        budget: optimizer steps of all runs.
    """

    folds: int
    steps: int
    interval: int
    budget: int

    def round_up(self, steps: float) -> int:
        """A number of steps as a multiple of the interval, within the run."""
        return min(self.steps, math.ceil(steps / self.interval) * self.interval)

    @property
    def first_rung(self) -> int:
        """Steps of each run on the first rung."""
        return self.round_up(self.steps / 2)

    def folder_name(self, trial: Trial) -> str:
        """Name of a run's folder: its values, in letters that every file system has."""
        values = "_".join(value for _, value in trial.candidate)
        name = quote(values or "as_given", safe="+")
        if len(name) > NAME_LENGTH:
            name = f"{name[:80]}-{digest_texts([name])}"
        return f"{name}_fold{trial.fold + 1}" if self.folds > 1 else name


def lowest_point(curve: Curve) -> tuple[float, int]:
    """The lowest mean loss of a curve and its step, without the base model's loss at step 0."""
    # Of equal losses the first one: tuples are compared by their steps next.
    return min((float(losses.mean()), step) for step, losses in curve.items() if step > 0)


class Halving:
    """Successive halving with its measurements.

    Args:
        plan: size of the search.
        train_trials: trains runs.

    Attributes:
        curves: candidate -> its curves on the first folds, in order.
        dropped: candidate -> why it could not go on, or how much worse it is.
        spent_steps: optimizer steps of all runs so far.
    """

    def __init__(self, plan: Plan, train_trials: TrainTrials) -> None:
        self.plan = plan
        self._train_trials = train_trials
        self.curves: dict[Candidate, list[Curve]] = {}
        self.dropped: dict[Candidate, str] = {}
        self.spent_steps = 0

    def run(self, space: Space) -> None:
        """Search a space; with a large budget train the command line as it is too."""
        # The choice is compared with this run.
        reserve = self.plan.steps if self.plan.budget >= 4 * self.plan.steps else 0
        self._explore(space, int(EXPLORED_SHARE * (self.plan.budget - reserve)))
        self._promote_better_halves(self.plan.budget - reserve)
        if self.curves and reserve:
            as_given = Trial((), fold=0, steps=self.plan.steps)
            self._train_within(self.plan.budget, [as_given])

    def expected_curve(self, candidate: Candidate, folds: int | None = None) -> Curve:
        """Estimate the losses of a run on all samples from the curves on folds.

        A run on all samples overfits later than one on a part of them: after as many epochs if the
        samples differ, after as many steps if they are alike. Its loss at a step is therefore
        estimated by the mean of the curve from half way between these two up to that step.

        Args:
            candidate: candidate with curves.
            folds: number of its first folds to read; None for all.

        Returns:
            Losses of the folds' samples at each step that all of these folds have.
        """
        curves = self.curves[candidate][:folds]
        steps = sorted(set.intersection(*map(set, curves)))
        step_losses = []
        for step in steps:
            step_losses.append(np.concatenate([curve[step] for curve in curves]))
        losses = np.array(step_losses)  # (steps, samples of all folds)
        expected = dict(zip(steps, losses, strict=True))
        if self.plan.folds == 1:  # with a held-out set each run is on all samples
            return expected
        # A mean of interpolated losses is linear in the losses. The weight of a step is the mean
        # of a curve that is 1 at this step and 0 elsewhere.
        unit_curves = np.eye(len(steps))
        for step in steps:
            # On a part the same epochs take step * (1 - 1/k) steps; half way to the step is
            # (1 - 1/2k). Nine points stand for all steps in between.
            points = np.linspace(step * (1 - 0.5 / self.plan.folds), step, 9)
            # Weight of each measured step in the mean of the interpolated curve, (steps, 1). A step
            # of weight 0 must not count, also if its loss is infinite: 0 * inf is nan.
            weights = np.array([[np.interp(points, steps, unit).mean()] for unit in unit_curves])
            expected[step] = (weights * np.where(weights > 0, losses, 0)).sum(0)
        return expected

    def _explore(self, space: Space, limit: int) -> None:
        """First rung: all candidates if the budget is large enough, else one option at a time.

        Args:
            space: options and their values.
            limit: optimizer steps that may be spent; the start of each method is trained anyway.
        """
        limit = max(limit, len(space.starts()) * self.plan.first_rung)
        axes = space.axes()  # the rate first, so that other options are compared at the best one
        if self._train_first_rung(space.grid(limit / self.plan.first_rung), limit):
            if RATE in axes:
                self._extend_rates(space, limit)
        elif self._train_first_rung(space.starts(), limit):
            for name in axes:
                variants = []
                for leader in self._leaders(space):
                    variants += space.variants(name, leader)
                self._train_first_rung(variants, limit)
                if name == RATE:
                    self._extend_rates(space, limit)

    def _extend_rates(self, space: Space, limit: int) -> None:
        """Go on beyond the space while the best rate of a method is the lowest or the highest.

        The rates of a file are not extended (`Space.extends_rates`).
        """
        has_trained = True
        while has_trained:
            rates = space.next_rates(self._leaders(space), self.curves)
            has_trained = self._train_first_rung(rates, limit)

    def _train_first_rung(self, candidates: Iterable[Candidate], limit: int) -> bool:
        """Train candidates to the first rung, on the first fold; see `_train_within`."""
        steps = self.plan.first_rung
        trials = [Trial(candidate, fold=0, steps=steps) for candidate in candidates]
        return self._train_within(limit, trials)

    def _promote_better_halves(self, limit: int) -> None:
        """Further rungs: promote the better half until all are finished or the budget is spent."""
        size = len(self._ranking())
        while unfinished := self._unfinished():
            size = max(2, math.ceil(size / 2))
            promotions = [self._promotion(candidate) for candidate in unfinished[:size]]
            # The best one goes on in any case; all others share half of the steps that are left.
            cost_of_best = sum(self._cost(trial) for trial in promotions[0])
            share = max(cost_of_best, (limit - self.spent_steps) // 2)
            trials: list[Trial] = []
            for promotion in promotions:
                trials += promotion
            # If nothing fits into the share, all steps that are left may be spent.
            affordable = min(limit, self.spent_steps + share)
            if not (self._train_within(affordable, trials) or self._train_within(limit, trials)):
                return

    def _drop_worse(self, ranking: Sequence[Candidate]) -> None:
        """Drop candidates whose whole interval of differences to the first one is above 0."""
        for candidate in ranking[1:]:
            folds = len(self.curves[candidate])
            # A promotion on folds that it has means that its curve still falls: it may get better.
            is_falling = any(trial.fold < folds for trial in self._promotion(candidate))
            if is_falling or folds > len(self.curves[ranking[0]]):
                continue
            differences = self._differences(candidate, ranking[0])
            interval = mean_interval(differences)
            if interval is not None and interval.low > 0:
                reason = f"worse by {differences.mean():.4g}"
                self.dropped[candidate] = f"{reason} ({interval.low:.4g} to {interval.high:.4g})"

    def _unfinished(self) -> list[Candidate]:
        """Candidates that can be promoted, the best first, once the worse ones are dropped."""
        ranking = self._ranking()
        self._drop_worse(ranking)
        unfinished = []
        for candidate in ranking:
            if candidate not in self.dropped and self._promotion(candidate):
                unfinished.append(candidate)
        return unfinished

    def _train_within(self, limit: int, trials: Sequence[Trial]) -> bool:
        """Train trials that are not measured yet, as far as the spent steps stay within a limit.

        Returns:
            True if there was such a trial.
        """
        affordable: list[Trial] = []
        for trial in dict.fromkeys(trials):
            cost = self._cost(trial)
            # Steps count as spent from here on, so that all trials together stay within the limit.
            if cost and trial.candidate not in self.dropped and self.spent_steps + cost <= limit:
                self.spent_steps += cost
                affordable.append(trial)
        for trial, curve in zip(affordable, self._train_trials(affordable), strict=True):
            if isinstance(curve, str):
                self.dropped[trial.candidate] = curve
                self.spent_steps -= self._cost(trial)  # the run ended early, or did not begin
            elif not math.isfinite(lowest_point(curve)[0]):
                self.dropped[trial.candidate] = "no step has a finite held-out loss"
            else:
                curves = self.curves.setdefault(trial.candidate, [])
                curves[trial.fold : trial.fold + 1] = [curve]  # replaces it, or goes at the end
        return bool(affordable)

    def _cost(self, trial: Trial) -> int:
        """Steps that a trial takes beyond those that its run has taken."""
        curves = self.curves.get(trial.candidate, [])
        steps_taken = max(curves[trial.fold]) if trial.fold < len(curves) else 0
        return max(0, trial.steps - steps_taken)

    def _promotion(self, candidate: Candidate) -> list[Trial]:
        """Trials that promote a candidate: to more steps, or to one more fold if its curve is
        complete; none if it has all folds.
        """
        curve = self.expected_curve(candidate)
        folds = len(self.curves[candidate])
        # A curve whose lowest point is near its end may still fall.
        needed_steps = self.plan.round_up(MARGIN * lowest_point(curve)[1])
        is_complete = needed_steps <= max(curve)
        if not is_complete:
            return [Trial(candidate, fold, needed_steps) for fold in range(folds)]
        if folds < self.plan.folds:
            return [Trial(candidate, folds, needed_steps)]
        return []

    def _differences(
        self, candidate: Candidate, best: Candidate, steps: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Losses of a candidate minus those of another one, by sample, on the folds of both.

        Args:
            candidate: the candidate.
            best: the other one.
            steps: step of each; None for the lowest point of each curve.
        """
        folds = min(len(self.curves[candidate]), len(self.curves[best]))
        curve = self.expected_curve(candidate, folds)
        best_curve = self.expected_curve(best, folds)
        step, best_step = steps or (lowest_point(curve)[1], lowest_point(best_curve)[1])
        return curve[step] - best_curve[best_step]

    def _ranking(self) -> list[Candidate]:
        """Candidates that are not dropped: the best one, then the others by difference to it."""
        remaining = [c for c in self.curves if c and c not in self.dropped]
        if not remaining:
            return []
        # The best one has the lowest loss among those on most folds. If one alone is on most folds,
        # it would have no rival, so the second largest number of folds counts.
        fold_counts = sorted(len(self.curves[candidate]) for candidate in remaining)
        most_folds = fold_counts[-2] if len(fold_counts) > 1 else fold_counts[0]
        rivals = [candidate for candidate in remaining if len(self.curves[candidate]) >= most_folds]
        best = min(rivals, key=lambda c: lowest_point(self.expected_curve(c, most_folds)))

        def rank(candidate: Candidate) -> tuple[bool, float]:
            return candidate != best, self._differences(candidate, best).mean()

        return sorted(remaining, key=rank)

    def _leaders(self, space: Space) -> list[Candidate]:
        """The best candidate of each method, the lowest first; then the starts of methods without
        one, whose starts could not be trained.
        """
        leaders: dict[str | None, Candidate] = {}
        for candidate in self._ranking():
            leaders.setdefault(dict(candidate).get(METHOD), candidate)
        untrained = [start for start in space.starts() if dict(start).get(METHOD) not in leaders]
        return [*leaders.values(), *untrained]

    @property
    def choice(self) -> tuple[Candidate, int]:
        """The best candidate, and the step of its lowest point.

        Raises:
            TrainingError: no candidate could be trained.
        """
        ranking = self._ranking()
        if not ranking:
            reason = next(iter(self.dropped.values()), "")
            raise TrainingError(
                f"no configuration could be trained ({reason}): give --fit_space lower rates or"
                " smaller ranks."
            )
        return ranking[0], lowest_point(self.expected_curve(ranking[0]))[1]

    def standings(self) -> dict[Candidate, dict[str, Any]]:
        """Compare all candidates with the choice, by paired differences on the folds of both.

        Returns:
            The choice, then the others, those on more folds first, by difference; last the command
            line as it is, at its last step.
        """
        chosen, chosen_step = self.choice
        rows: dict[Candidate, dict[str, Any]] = {}
        for candidate, curves in self.curves.items():
            curve = self.expected_curve(candidate)
            # Without a search nobody would know at which step the command line as it is ends best.
            step = lowest_point(curve)[1] if candidate else max(curve)
            differences = self._differences(candidate, chosen, (step, chosen_step))
            rows[candidate] = {
                "steps": step,
                "folds": min(len(curves), len(self.curves[chosen])),
                "difference": float(differences.mean()),
                "interval": mean_interval(differences),
            }

        def rank(candidate: Candidate) -> tuple[bool, bool, int, float]:
            row = rows[candidate]
            return candidate != chosen, not candidate, -row["folds"], row["difference"]

        return {candidate: rows[candidate] for candidate in sorted(rows, key=rank)}
