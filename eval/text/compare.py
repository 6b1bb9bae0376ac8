"""Rows of the table and how they differ: means over seeds, differences in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from .. import groups
from ..statistics import LEVEL, Interval, mean_and_error, paired_difference
from .schema import BenchmarkEntry, Comparison, Measured, RunEntry, Score, Summary
from .subjects import BASE

SEEDS, ITEMS = "seeds", "items"


def rows(runs: Sequence[RunEntry]) -> list[str]:
    """The groups in their order, the base model first."""
    found = list(dict.fromkeys(run.group for run in runs))
    bare = dict.fromkeys(run.group for run in runs if run.kind == BASE)
    return [*bare, *(group for group in found if group not in bare)]


def settle_control(runs: Sequence[RunEntry], control: str | None) -> str | None:
    """The group that others are compared with: the given one, else LoRA, else the first but base.

    Raises:
        UserError: there is no such group.
    """
    names = rows(runs)
    if control is not None:
        return names[groups.control(names, control)]
    if len(names) < 2:
        return None
    plain = [run.group for run in runs if run.method == "lora"]
    trained = [name for name in names if name not in {r.group for r in runs if r.kind == BASE}]
    return (plain or trained or names)[0]


def summaries(
    runs: Sequence[RunEntry], columns: Sequence[BenchmarkEntry], scores: Sequence[Score]
) -> list[Summary]:
    """Each cell that has a score."""
    found = []
    for group in rows(runs):
        for benchmark in range(len(columns)):
            values = [score.measured.value for score in _cell(runs, scores, group, benchmark)]
            cell = mean_and_error(values)
            if cell is not None:
                found.append(Summary(group, benchmark, *cell, len(values)))
    return found


def comparisons(
    runs: Sequence[RunEntry],
    columns: Sequence[BenchmarkEntry],
    scores: Sequence[Score],
    control: str | None,
) -> list[Comparison]:
    """Every other row minus the control, where both have a score and something to pair."""
    if control is None:
        return []
    found = []
    for group in rows(runs):
        for benchmark, column in enumerate(columns):
            ours = _cell(runs, scores, group, benchmark)
            theirs = _cell(runs, scores, control, benchmark)
            if group == control or not ours or not theirs:
                continue
            made = _over_seeds(runs, ours, theirs, column) or _over_items(ours, theirs, column)
            if made is not None:
                over, pairs, mean, interval, better = made
                found.append(
                    Comparison(group, control, benchmark, over, pairs, mean, interval, better)
                )
    return found


Made = tuple[str, int, float, Interval | None, int]


def _over_seeds(
    runs: Sequence[RunEntry],
    ours: Sequence[Score],
    theirs: Sequence[Score],
    column: BenchmarkEntry,
) -> Made | None:
    one, other = (dict(_by_seed(runs, cell)) for cell in (ours, theirs))
    found = paired_difference(one, other, higher_is_better=column.higher_is_better)
    if found is None or (found.seeds < 2 and ours[0].measured.items):
        return None
    return SEEDS, found.seeds, found.mean, found.interval, found.better


def _by_seed(runs: Sequence[RunEntry], cell: Sequence[Score]) -> list[tuple[int, float]]:
    return [
        (seed, score.measured.value) for score in cell if (seed := runs[score.run].seed) is not None
    ]


def _over_items(
    ours: Sequence[Score], theirs: Sequence[Score], column: BenchmarkEntry
) -> Made | None:
    if not all(means_of_items(score.measured) for score in (*ours, *theirs)):
        return None
    one, other = _item_means(ours), _item_means(theirs)
    names = [name for name in one if name in other]
    if not names:
        return None
    differences = [one[name] - other[name] for name in names]
    sign = 1 if column.higher_is_better else -1
    better = sum(sign * difference > 0 for difference in differences)
    mean = math.fsum(differences) / len(differences)
    return ITEMS, len(names), mean, t_interval(differences), better


def t_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of many values, by Student's t; None below two."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    reach = float(stats.sem(array) * stats.t.ppf((1 + LEVEL) / 2, len(array) - 1))
    return Interval(float(array.mean()) - reach, float(array.mean()) + reach)


def _item_means(cell: Sequence[Score]) -> Mapping[str, float]:
    """Each item's mean over the runs of a cell; items without a number are left out."""
    values: dict[str, list[float]] = {}
    for score in cell:
        for item in score.measured.items:
            if item.score is not None:
                values.setdefault(item.id, []).append(item.score)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def _cell(
    runs: Sequence[RunEntry], scores: Sequence[Score], group: str, benchmark: int
) -> list[Score]:
    return [s for s in scores if s.benchmark == benchmark and runs[s.run].group == group]


def means_of_items(measured: Measured) -> bool:
    """Whether the value is the mean of its items' scores, which pairs of items need."""
    scores = [item.score for item in measured.items if item.score is not None]
    return bool(scores) and math.isclose(
        math.fsum(scores) / len(scores), measured.value, abs_tol=1e-9
    )
