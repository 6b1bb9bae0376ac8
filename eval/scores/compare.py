"""Adapters compared: means over prompts, paired differences, win rates and their 95 % intervals.

Pure functions on a :class:`~eval.scores.schema.ScoresResult`. The unit is the prompt: the scores of
a prompt's images are averaged over seeds first, because images of one prompt are no independent
draws. All adapters share prompts, seeds and noise, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scipy import stats

from ..statistics import LEVEL, Interval, bootstrap_interval
from .schema import METRICS, Comparison, ScoresResult, Summary

Table = dict[int, dict[int, float]]
"""Adapter -> prompt -> score, by their positions in the result."""

BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


def compared(result: ScoresResult, control: int | None) -> ScoresResult:
    """The result with its summaries and comparisons filled in.

    Args:
        result: with images and diversity.
        control: position of the adapter that the others are compared with; None for no comparison.
    """
    rows = [] if control is None else comparisons(result, control)
    return replace(result, summaries=summaries(result), comparisons=rows)


def per_prompt(result: ScoresResult, metric: str) -> Table:
    """A score's mean over seeds, for each adapter and each prompt that has it.

    Args:
        metric: a key of ``METRICS``.
    """
    if metric == "diversity":
        return {
            adapter: {
                number: of_prompt[prompt.text]
                for number, prompt in enumerate(result.prompts)
                if prompt.text in of_prompt and not prompt.general
            }
            for adapter, entry in enumerate(result.adapters)
            if (of_prompt := result.diversity.get(entry.label))
        }
    seeds: dict[int, dict[int, list[float]]] = {}
    for image in result.images:
        value = getattr(image, metric)
        if value is not None:
            seeds.setdefault(image.adapter, {}).setdefault(image.prompt, []).append(value)
    return {
        adapter: {prompt: _mean(values) for prompt, values in sorted(prompts.items())}
        for adapter, prompts in sorted(seeds.items())
    }


def summaries(result: ScoresResult) -> list[Summary]:
    """Mean over prompts and its bootstrap interval, for each score and each adapter that has it."""
    found = []
    for metric in METRICS:
        for adapter, prompts in per_prompt(result, metric).items():
            values = list(prompts.values())
            interval = bootstrap_interval(values)
            found.append(Summary(adapter, metric, _mean(values), interval, len(values)))
    return found


def comparisons(result: ScoresResult, control: int) -> list[Comparison]:
    """Every other adapter minus the control, in each score that both have.

    Args:
        control: position of an adapter.
    """
    found = []
    for metric in METRICS:
        table = per_prompt(result, metric)
        for adapter in table:
            values = list(differences(table, adapter, control).values())
            if adapter != control and values:
                found.append(comparison(metric, adapter, control, values))
    return found


def differences(table: Table, adapter: int, control: int) -> dict[int, float]:
    """Adapter minus control for each prompt that both have."""
    ours, theirs = table.get(adapter, {}), table.get(control, {})
    return {prompt: ours[prompt] - theirs[prompt] for prompt in ours if prompt in theirs}


def comparison(metric: str, adapter: int, control: int, values: Sequence[float]) -> Comparison:
    """What paired differences say.

    Args:
        values: (n,) differences, at least one; exactly 0 is a tie.
    """
    wins = sum(value > 0 for value in values)
    losses = sum(value < 0 for value in values)
    ties = len(values) - wins - losses
    return Comparison(
        metric=metric,
        adapter=adapter,
        control=control,
        mean=_mean(values),
        interval=bootstrap_interval(values),
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=(wins + ties / 2) / len(values),
        win_rate_interval=win_rate_interval(wins, ties, losses),
    )


def win_rate_interval(wins: int, ties: int, losses: int) -> Interval | None:
    """95 % interval of (wins + ties / 2) / n.

    Wilson's interval of a proportion where there is no tie; it has width even where all prompts are
    won. With ties the rate is no proportion, and the interval is a bootstrap over the prompts'
    1, 1/2 and 0.

    Returns:
        The interval; None where there are ties and fewer than two prompts.
    """
    if ties:
        return bootstrap_interval([1.0] * wins + [0.5] * ties + [0.0] * losses)
    proportion = stats.binomtest(wins, wins + losses).proportion_ci(LEVEL, method="wilson")
    return Interval(float(proportion.low), float(proportion.high))


def verdict(found: Comparison) -> str | None:
    """Whether the interval of the mean difference shows the adapter better or worse.

    Returns:
        ``BETTER``, ``WORSE`` or ``UNDECIDED``; None for a score that does not judge.
    """
    higher_is_better = METRICS[found.metric].higher_is_better
    if higher_is_better is None:
        return None
    if found.interval is None or found.interval.low <= 0 <= found.interval.high:
        return UNDECIDED
    return BETTER if (found.mean > 0) == higher_is_better else WORSE


def summary(result: ScoresResult, metric: str) -> Mapping[int, Summary]:
    """The summaries of one score, by adapter."""
    return {row.adapter: row for row in result.summaries if row.metric == metric}


def _mean(values: Sequence[float]) -> float:
    # fsum rounds once, so that the order of seeds and prompts does not show
    return math.fsum(values) / len(values)
