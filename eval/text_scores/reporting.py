"""Tables of scores in the form of the paper's Tables 1 to 3.

Differences are paired over seeds, or over items if there are fewer than two common seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from bilora_diffusion.core.statistics import CONFIDENCE

from ..results import compare
from ..results.report import INTERVALS, bullet_list, escape_table_cell, table
from ..results.table import Metric, Result, Row, Summary
from .benchmarks import EFFECT, HELDOUT_LOSS, UNPARSED

ABSENT = "–"


def summaries(
    rows: Sequence[Row],
    benchmarks: Collection[str],
    control: str,
    confidence: float = CONFIDENCE,
) -> list[Summary]:
    """Compute the means over seeds, and each group's difference from the control.

    Args:
        rows: rows of the result; a row with an item is a single question, the others are scores.
        benchmarks: names of the metrics that may have items.
        control: group that the others are compared with.
        confidence: confidence level of the intervals of differences.
    """
    scores = []
    groups_with_items = set()
    for row in rows:
        if row.item:
            groups_with_items.add((row.group, row.metric))
        else:
            scores.append(row)
    # (group, metric) -> the difference over items
    over_items: dict[tuple[str, str], Summary] = {}
    for name in benchmarks:
        items = averaged_items(rows, name)
        lines = compare.summaries(items, control, compare.ITEM, confidence=confidence)
        for line in lines:
            over_items[line.group, name] = line

    summaries = []
    for line in compare.summaries(scores, control, confidence=confidence):
        key = line.group, line.metric
        # A single pair of seeds has no interval, but pairs of questions do.
        if line.metric in benchmarks and key in groups_with_items and line.pairs < 2:
            line = with_difference(line, over_items.get(key, Summary(*key)))
        summaries.append(line)
    return summaries


def averaged_items(rows: Sequence[Row], benchmark: str) -> list[Row]:
    """Return the items of the groups in which every score is the mean of its items.

    Only in these groups is a difference over items also the difference of the scores.
    """
    items, scores = [], []
    values: dict[str, list[float]] = {}  # subject -> the values of its items
    for row in rows:
        if row.metric != benchmark:
            continue
        if not row.item:
            scores.append(row)
            continue
        items.append(row)
        if row.value is not None:
            values.setdefault(row.subject, []).append(row.value)

    # Some scores of the harness are not the mean of their items.
    excluded_groups = set()
    for row in scores:
        item_values = values.get(row.subject)
        score = row.value or 0.0
        if not item_values or not math.isclose(compare.mean(item_values), score, abs_tol=1e-9):
            excluded_groups.add(row.group)
    return [row for row in items if row.group not in excluded_groups]


def with_difference(line: Summary, over_items: Summary) -> Summary:
    """Replace a summary's difference from the control with the difference over items."""
    return replace(
        line,
        over=compare.ITEM,
        control=over_items.control,
        difference=over_items.difference,
        difference_low=over_items.difference_low,
        difference_high=over_items.difference_high,
        higher=over_items.higher,
        equal=over_items.equal,
        lower=over_items.lower,
    )


def notes(rows: Sequence[Row], metrics: Mapping[str, Metric], limit: int | None) -> list[str]:
    """Return the notes above the table."""
    sentences = []
    if limit is not None and any(row.item for row in rows):
        sentences.append(
            f"Only the first {limit} items of each task were used (--limit), so this is a trial and"
            " not a result."
        )
    for name, metric in metrics.items():
        items = []
        unparsed = 0
        for row in rows:
            if row.metric == f"{name} {UNPARSED}":
                unparsed += int(row.value or 0)
            elif row.metric == name and row.item:
                items.append(row)
        if unparsed:
            # A missing rating of the judge is no score; a missing answer in the harness is wrong.
            are_left_out = any(row.value is None for row in items)
            consequence = "are left out" if are_left_out else "count as wrong"
            sentences.append(
                f"{metric.title}: no answer or rating could be read in {unparsed} of {len(items)}"
                f" items; these {consequence}."
            )
    labels: dict[str, None] = {}  # of adapters without effect, each once
    for row in rows:
        if row.metric.endswith(f" {EFFECT}") and row.value == 0:
            labels[row.subject] = None
    for label in labels:
        sentences.append(f"The adapter of {label} is zero, so {label} equals the base model.")
    return sentences


def introduction(result: Result) -> str:
    """Return the notes, and an explanation of the table's cells."""
    legend = (
        f"Means over seeds with {INTERVALS}; in percent, except for points, losses and"
        f" perplexities. Differences are from {escape_table_cell(result.control)}, paired over"
        " common seeds or, with fewer than two common seeds, over items (the same questions); the"
        " cell also counts the pairs with a better score. An interval over items covers the choice"
        " of questions, not the variation between seeds. Cost: gradient steps per training"
        " iteration. Peak memory: the maximum that a run's training took (on a CPU, the memory of"
        " the process)."
    )
    quotes = [f"> {note}" for note in result.notes]
    return "\n\n".join([*quotes, legend])


def averages(result: Result) -> str:
    """Return a table of each group's mean over training sets; "" for fewer than two sets.

    It averages the first recorded metric of each set, as the paper's Tables 1, 2 and 6 do. Losses
    are not averaged.
    """
    metric_by_set: dict[str, str] = {}
    for name, settings in result.settings["benchmarks"].items():
        if "training_set" in settings and settings["metric"] != HELDOUT_LOSS:
            metric_by_set.setdefault(settings["training_set"], name)
    names = list(metric_by_set.values())
    if len(names) < 2:
        return ""

    lines = []
    for group in result.groups:
        values = []
        for name in names:
            summary = result.summary(group, name)
            if summary is not None and summary.mean is not None:
                values.append(summary.mean * result.metric(name).scale)
        # A mean over fewer training sets would not be comparable.
        is_complete = len(values) == len(names)
        lines.append([group, f"{compare.mean(values):.2f}" if is_complete else ABSENT])
    titles = ", ".join(result.metric(name).title for name in names)
    return table(["run", f"mean of {titles}"], lines)


def cost(result: Result, group: str) -> str:
    """Return the gradient steps per iteration; a dash if a group's runs differ or lack them."""
    costs = {entry.about.get("cost") for entry in result.members(group)}
    if len(costs) != 1 or None in costs:
        return ABSENT
    return f"×{costs.pop()}"


def memory(result: Result, group: str) -> str:
    """Return the maximum peak memory of the group's training runs; a dash if it is unknown."""
    peak = max(entry.about.get("peak_memory") or 0 for entry in result.members(group))
    return f"{peak / 2**30:.2f} GiB" if peak else ABSENT


def settings_of_benchmarks(result: Result) -> str:
    """Return a list with one line per benchmark that shows its settings."""
    lines = []
    for name, settings in result.settings["benchmarks"].items():
        words = [f"{key} {value}" for key, value in settings.items() if value is not None]
        lines.append(f"{escape_table_cell(result.metric(name).title)}: {', '.join(words)}.")
    return bullet_list(lines)
