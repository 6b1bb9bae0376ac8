"""Results in Markdown: tables of groups with their differences, figures, notes, origin."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .table import Metric, Provenance, Result, Summary

Interval = tuple[float, float]
NOT_AVAILABLE = "n/a"
FEW_SEEDS = 10
MOST_FURTHER = 2
"""Decimals beyond a metric's own; a smaller interval is one of rounding errors."""
INTERVALS = "its 95 % interval (bootstrap, BCa)"


@dataclass(frozen=True)
class Column:
    """A metric in a table of groups, shown by its :class:`~eval.table.Metric`.

    Args:
        item: of the metric.
        difference: whether its difference to the control's stands beside it.
        interval: whether the mean has its interval.
    """

    metric: str
    item: str = ""
    difference: bool = False
    interval: bool = True


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what could break it in a cell is escaped."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def escaped(text: str) -> str:
    """Text of a user on one line, without what would end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; "" where there is nothing."""
    return "\n\n".join([f"## {title}", *filter(None, parts)]) if any(parts) else ""


def page(*parts: str) -> str:
    """A whole report."""
    return "\n\n".join(filter(None, parts)) + "\n"


def listed(sentences: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def number(value: float | None, metric: Metric, sign: str = "") -> str:
    """A value as its metric is shown; ``sign`` is "+" for a difference."""
    return NOT_AVAILABLE if value is None else f"{metric.scale * value:{sign}{metric.form}}"


def interval(ends: Interval | None, metric: Metric, sign: str = "") -> str:
    """An interval in brackets."""
    return "[" + ", ".join(number(end, metric, sign) for end in ends or [None]) + "]"


def resolved(metric: Metric, size: float) -> Metric:
    """The metric with as many decimals as show two digits of ``size``, and no fewer than its own.

    Args:
        metric: whose form is a number of decimals; another form is left as it is.
        size: of an interval, or of a difference without one.
    """
    form = re.fullmatch(r"\.(\d+)f", metric.form)
    size = abs(metric.scale * size)
    if form is None or size == 0 or not math.isfinite(size):
        return metric
    decimals = int(form[1])
    needed = 1 - math.floor(math.log10(size))
    decimals = min(max(decimals, needed), decimals + MOST_FURTHER)
    return replace(metric, form=f".{decimals}f")


def mean(line: Summary | None, metric: Metric, intervals: bool = True) -> str:
    """A group's mean, with its interval."""
    if line is None or line.mean is None:
        return NOT_AVAILABLE
    if not intervals or line.interval is None:
        return number(line.mean, metric)
    low, high = line.interval
    metric = resolved(metric, high - low)
    return f"{number(line.mean, metric)} {interval(line.interval, metric)}"


def difference(line: Summary | None, metric: Metric) -> str:
    """A mean difference with its interval, and in how many pairs the group is better."""
    if line is None or line.difference is None:
        return NOT_AVAILABLE
    low, high = line.difference_interval or (0.0, 0.0)
    metric = resolved(metric, high - low or line.difference)
    text = (
        f"{number(line.difference, metric, '+')} {interval(line.difference_interval, metric, '+')}"
    )
    if metric.higher_is_better is None:
        return text
    return f"{text}, {line.better(metric.higher_is_better)}/{line.pairs}"


def comparison(
    result: Result,
    columns: Sequence[Column],
    facts: Mapping[str, Callable[[str], str]] | None = None,
) -> str:
    """The groups in rows, a metric's mean and perhaps its difference to the control's in columns.

    Args:
        facts: head -> a word about a group before its metrics; by default how many runs there
            are, and groups without any of the metrics are left out.
    """
    columns_of_facts = facts or {"seeds": lambda group: str(len(result.members(group)))}
    head, rows = ["run", *columns_of_facts], []
    for column in columns:
        head.append(result.metric(column.metric).title)
        if column.difference:
            head.append("difference")
    for group in result.groups:
        lines = [result.summary(group, column.metric, column.item) for column in columns]
        if facts is None and not any(lines):
            continue
        is_control = group == result.control
        row = [f"{group} (control)" if is_control else group]
        row += [fact(group) for fact in columns_of_facts.values()]
        for column, line in zip(columns, lines, strict=True):
            metric = result.metric(column.metric)
            change = "" if is_control else difference(line, metric)
            if result.settings.get("paired", {}).get(group) is False:
                change = "not paired"
            row.append(mean(line, metric, column.interval))
            if column.difference:
                row.append(change)
        rows.append(row)
    return table(head, rows)


def pictures(result: Result) -> str:
    """The figures, one under another."""
    return "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in result.figures)


def sources(result: Result) -> list[str]:
    """Kind, source and weights of each subject."""
    sentences = []
    for entry in result.subjects:
        words = [entry.kind, entry.source, entry.method]
        words += [f"on {entry.base_model}"] if entry.base_model else []
        weights = entry.digest and f"weights {entry.digest[:12]}"
        quantize = entry.about.get("quantize", "none")
        words += ["" if quantize == "none" else quantize, weights]
        sentences.append(f"{entry.label}: {', '.join(filter(None, words))}.")
    return sentences


def closing(result: Result, packages: Sequence[str] = ("torch",), facts: Sequence[str] = ()) -> str:
    """The end of a report: figures, notes, and where it comes from."""
    notes = list(map(escaped, result.notes))
    if any(1 < len(result.members(group)) < FEW_SEEDS for group in result.groups):
        notes.append("With fewer than ten seeds a bootstrap interval is too narrow.")
    sentences = [*notes, *map(escaped, facts), *origin(result.provenance, packages)]
    return page(pictures(result), listed(sentences)).rstrip()


def origin(provenance: Provenance | None, packages: Sequence[str] = ("torch",)) -> list[str]:
    """Origin of a result: command, machine, versions of some packages, commit."""
    if provenance is None:
        return []
    device = provenance.device
    cores = f", {device['cpu_cores']} cores" if device.get("type") == "cpu" else ""
    commit = "" if provenance.commit is None else f", commit {provenance.commit[:12]}"
    changed = " with uncommitted changes" if provenance.uncommitted_changes else ""
    versions = ", ".join(f"{package} {provenance.versions.get(package)}" for package in packages)
    name = device.get("name") or "unknown device"
    lines = [f"`{provenance.command}`", f"{name}{cores}, {versions}{commit}{changed}."]
    if provenance.differing:
        differences = ", ".join(name.replace("_", " ") for name in provenance.differing)
        lines.append(f"The runs differ in {json.dumps(differences)}; the first run's is given.")
    return lines
