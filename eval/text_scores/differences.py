"""How rows differ: over seeds, or over items where there are not two common seeds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from .. import compare
from ..table import Row, Summary


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
            interval=compare.student_interval,
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
    items = items or Summary(line.group, line.metric)
    return replace(
        line,
        over=compare.ITEM,
        control=items.control,
        difference=items.difference,
        difference_low=items.difference_low,
        difference_high=items.difference_high,
        higher=items.higher,
        equal=items.equal,
        lower=items.lower,
    )
