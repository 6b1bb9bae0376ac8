"""Scores for reading, after the paper's Tables 1 to 3, and how rows differ: over seeds, or over
items where there are not two common seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from bilora_diffusion.core.intervals import student_interval

from .. import compare
from ..report import INTERVALS, escaped, listed, table
from ..table import Metric, Result, Row, Summary
from .benchmarks import EFFECT, HELDOUT_LOSS, UNPARSED

ABSENT = "–"
COMPARED = ("control", "difference", "difference_low", "difference_high")
COMPARED += ("higher", "equal", "lower")
"""Of a summary, what says how it differs from the control's."""


def summaries(rows: Sequence[Row], benchmarks: Collection[str], control: str) -> list[Summary]:
    """Means over seeds, and each row's difference to the control's.

    Args:
        rows: those without an item are scores, those with one are questions.
        benchmarks: the metrics that have items.
    """
    asked = {name: [r for r in rows if r.metric == name and r.item] for name in benchmarks}
    by_item = {
        (line.group, name): line
        for name, items in asked.items()
        for line in compare.summaries(
            _exact(items, [row for row in rows if row.metric == name and not row.item]),
            control,
            compare.ITEM,
            interval=student_interval,
        )
    }
    lines = []
    for line in compare.summaries([row for row in rows if not row.item], control):
        has_items = any(row.group == line.group for row in asked.get(line.metric, ()))
        if has_items and line.pairs < 2:
            line = _over_items(line, by_item.get((line.group, line.metric)))
        lines.append(line)
    return lines


def _exact(items: Sequence[Row], scores: Sequence[Row]) -> list[Row]:
    """The items of groups in which every score is the mean of its items, which pairs need."""
    values = {row.subject: [] for row in scores}
    for row in items:
        if row.value is not None:
            values[row.subject].append(row.value)
    other = {
        row.group
        for row in scores
        if not values[row.subject]
        or not math.isclose(compare.mean(values[row.subject]), row.value or 0.0, abs_tol=1e-9)
    }
    return [row for row in items if row.group not in other]


def _over_items(line: Summary, items: Summary | None) -> Summary:
    compared = vars(items or Summary(line.group, line.metric))
    return replace(line, over=compare.ITEM, **{name: compared[name] for name in COMPARED})


def notes(rows: Sequence[Row], titles: Mapping[str, Metric], limit: int | None) -> list[str]:
    """Sentences to be read before the table."""
    sentences = []
    if limit is not None and any(row.item for row in rows):
        sentences.append(
            f"Only the first {limit} items of each task were asked (--limit): these are no results,"
            " only a trial."
        )
    for name, metric in titles.items():
        unparsed = sum(int(r.value or 0) for r in rows if r.metric == f"{name} {UNPARSED}")
        if unparsed:
            items = [row for row in rows if row.metric == name and row.item]
            counted = (
                "are left out" if any(row.value is None for row in items) else "count as wrong"
            )
            sentences.append(
                f"{metric.title}: in {unparsed} of {len(items)} items no answer could be read; they"
                f" {counted}."
            )
    idle = [row.subject for row in rows if row.metric.endswith(f" {EFFECT}") and row.value == 0]
    sentences += [
        f"The adapter of {label} is zero: it is the base model." for label in dict.fromkeys(idle)
    ]
    return sentences


def introduction(result: Result) -> str:
    """Notes, and what the table's cells are."""
    legend = (
        f"Mean over seeds with {INTERVALS}; percentages, but for points and losses. Difference: to"
        f" {escaped(result.control)}, over common seeds by bootstrap, or over items (the same"
        " questions, where there are not two common seeds) by Student's t, and in how many of them"
        " it is better; items say how sure a difference of these runs is, not what another seed"
        " would bring. Cost: gradient steps per training iteration. Peak memory: the most that a"
        " run took to train, on a CPU by its process."
    )
    return "\n\n".join([*(f"> {note}" for note in result.notes), legend])


def averages(result: Result) -> str:
    """Mean over training sets of each row's first recorded metric, as in the paper's Tables 1, 2
    and 6; "" where there are not several sets with one.
    """
    first: dict[str, str] = {}
    for name, settings in result.settings["benchmarks"].items():
        if "training_set" in settings and settings["metric"] != HELDOUT_LOSS:
            first.setdefault(settings["training_set"], name)
    if len(first) < 2:
        return ""
    rows = []
    for group in result.groups:
        lines = [result.summary(group, name) for name in first.values()]
        values = [
            line.mean * result.metric(line.metric).scale
            for line in lines
            if line is not None and line.mean is not None
        ]
        average = f"{compare.mean(values):.2f}" if len(values) == len(first) else ABSENT
        rows.append([group, average])
    titles = [result.metric(name).title for name in first.values()]
    return table(["run", f"mean of {', '.join(titles)}"], rows)


def cost(result: Result, group: str) -> str:
    costs = {entry.about.get("cost") for entry in result.members(group)}
    return f"×{costs.pop()}" if len(costs) == 1 and None not in costs else ABSENT


def memory(result: Result, group: str) -> str:
    peak = max(entry.about.get("peak_memory") or 0 for entry in result.members(group))
    return f"{peak / 2**30:.2f} GiB" if peak else ABSENT


def asked(result: Result) -> str:
    lines = []
    for name, settings in result.settings["benchmarks"].items():
        words = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
        lines.append(f"{escaped(result.metric(name).title)}: {words}.")
    return listed(lines)
