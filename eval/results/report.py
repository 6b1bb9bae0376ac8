"""Reports in Markdown: tables of groups with differences, figures, notes and origin."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bilora_diffusion.core.statistics import BOOTSTRAP_FROM, Interval

from .table import Metric, Provenance, Result, Summary

NOT_AVAILABLE = "n/a"
# Maximum number of decimals beyond the metric's own. An interval that is too narrow to show with
# these is only rounding error.
MAX_FURTHER_DECIMALS = 2
# End of a sentence; see `core.statistics.mean_interval`
INTERVALS = f"a 95 % interval (Student's t; for {BOOTSTRAP_FROM} or more values, a BCa bootstrap)"


@dataclass(frozen=True)
class Column:
    """A metric in a table of groups; its `Metric` has the heading, scale and format."""

    metric: str
    # Item of the metric's summaries
    item: str = ""
    # Add a column with the difference from the control
    difference: bool = False
    # Show the interval of the mean
    interval: bool = True


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; characters that would break a cell are escaped."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(map(escape_table_cell, cells))} |")
    return "\n".join(lines)


def escape_table_cell(text: str) -> str:
    """Put a text on one line, and escape the characters that would end a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def section(title: str, *parts: str) -> str:
    """Return a heading and the parts under it; "" if all parts are empty."""
    if not any(parts):
        return ""
    return "\n\n".join([f"## {title}", *filter(None, parts)])


def page(*parts: str) -> str:
    """Return a whole report; empty parts are left out."""
    return "\n\n".join(filter(None, parts)) + "\n"


def bullet_list(sentences: Sequence[str]) -> str:
    """Return a Markdown list with an item for each sentence."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def number(value: float | None, metric: Metric, sign: str = "") -> str:
    """Return a value in the metric's scale and format; ``sign`` is "+" for a difference."""
    if value is None:
        return NOT_AVAILABLE
    return f"{metric.scale * value:{sign}{metric.form}}"


def interval(bounds: Interval | None, metric: Metric, sign: str = "") -> str:
    """Return an interval in brackets; see `number` for ``sign``."""
    if bounds is None:
        return f"[{NOT_AVAILABLE}]"
    low, high = bounds
    return f"[{number(low, metric, sign)}, {number(high, metric, sign)}]"


def with_decimals(metric: Metric, size: float) -> Metric:
    """Return the metric with enough decimals to show two significant digits of ``size``.

    At most `MAX_FURTHER_DECIMALS` decimals are added.

    Args:
        metric: metric whose ``form`` is a number of decimals; any other form is not changed.
        size: width of an interval, or a difference that has no interval; unscaled.
    """
    form = re.fullmatch(r"\.(\d+)f", metric.form)
    size = abs(metric.scale * size)
    if form is None or size == 0 or not math.isfinite(size):
        return metric
    decimals = int(form[1])
    # 0.034 has its first digit in the second decimal, so two digits need three decimals.
    needed = 1 - math.floor(math.log10(size))
    # Large intervals keep the metric's own decimals.
    decimals = min(max(decimals, needed), decimals + MAX_FURTHER_DECIMALS)
    return replace(metric, form=f".{decimals}f")


def mean(line: Summary | None, metric: Metric, intervals: bool = True) -> str:
    """Return the mean of a summary as text, with its interval if ``intervals`` is true."""
    if line is None or line.mean is None:
        return NOT_AVAILABLE
    if not intervals or line.interval is None:
        return number(line.mean, metric)
    low, high = line.interval
    metric = with_decimals(metric, high - low)
    return f"{number(line.mean, metric)} {interval(line.interval, metric)}"


def difference(line: Summary | None, metric: Metric) -> str:
    """Return a mean difference with its interval and, such as "3/5", the pairs with a better value.

    The pairs are left out if the metric has no better direction.
    """
    if line is None or line.difference is None:
        return NOT_AVAILABLE
    low, high = line.difference_interval or (0.0, 0.0)
    metric = with_decimals(metric, high - low or line.difference)
    bounds = interval(line.difference_interval, metric, "+")
    text = f"{number(line.difference, metric, '+')} {bounds}"
    if metric.higher_is_better is None:
        return text
    return f"{text}, {line.better(metric.higher_is_better)}/{line.pairs}"


def against_control(result: Result, line: Summary | None, group: str) -> str:
    """Return the control's mean without interval, or another group's difference from this mean."""
    if line is None:
        return NOT_AVAILABLE
    metric = result.metric(line.metric)
    if group == result.control:
        return mean(line, metric, intervals=False)
    return difference(line, metric)


def comparison(
    result: Result,
    columns: Sequence[Column],
    facts: Mapping[str, Callable[[str], str]] | None = None,
    control_mark: str = "control",
) -> str:
    """Return a table with a row for each group and columns for metrics and their differences.

    Args:
        result: result that the table shows.
        columns: columns of metrics.
        facts: further columns, before the metrics: heading -> function from a group to its cell.
            The default is a column "seeds" with the number of runs in the group; only in this case
            are groups without any of the metrics left out.
        control_mark: word that marks the control, after its name.
    """
    columns_of_facts = facts or {"seeds": lambda group: str(len(result.members(group)))}
    head = ["run", *columns_of_facts]
    rows = []
    for column in columns:
        head.append(result.metric(column.metric).title)
        if column.difference:
            head.append("difference")
    for group in result.groups:
        # None for a metric that was not measured in the group
        lines = [result.summary(group, column.metric, column.item) for column in columns]
        if facts is None and not any(lines):
            continue
        is_unpaired = result.settings.get("paired", {}).get(group) is False
        is_control = group == result.control
        cells = [f"{group} ({control_mark})" if is_control else group]
        cells += [fact(group) for fact in columns_of_facts.values()]
        for column, line in zip(columns, lines, strict=True):
            metric = result.metric(column.metric)
            cells.append(mean(line, metric, column.interval))
            if not column.difference:
                continue
            if is_unpaired:
                cells.append("not paired")
            elif is_control:
                cells.append("")
            else:
                cells.append(difference(line, metric))
        rows.append(cells)
    return table(head, rows)


def sources(result: Result) -> list[str]:
    """Return a sentence for each subject.

    It names the kind, source, method, base model, quantization and weights.
    """
    sentences = []
    for entry in result.subjects:
        facts = [entry.kind, entry.source, entry.method]
        if entry.base_model:
            facts.append(f"on {entry.base_model}")
        quantization = entry.about.get("quantize", "none")
        if quantization != "none":
            facts.append(quantization)
        if entry.digest:
            facts.append(f"weights {entry.digest[:12]}")
        sentences.append(f"{entry.label}: {', '.join(filter(None, facts))}.")
    return sentences


def closing(result: Result, packages: Sequence[str] = ("torch",), facts: Sequence[str] = ()) -> str:
    """Return the end of a report: figures, notes, facts, and the origin of the result."""
    pictures = [f"![{name.removesuffix('.png')}]({name})" for name in result.figures]
    sentences = [escape_table_cell(note) for note in result.notes]
    sentences += [escape_table_cell(fact) for fact in facts]
    sentences += origin(result.provenance, packages)
    return page(*pictures, bullet_list(sentences)).rstrip()


def origin(provenance: Provenance | None, packages: Sequence[str] = ("torch",)) -> list[str]:
    """Return sentences on a result's origin: command, machine, versions of packages, commit."""
    if provenance is None:
        return []
    device = provenance.device
    facts = [device.get("name") or "unknown device"]
    if device.get("type") == "cpu":
        facts.append(f"{device['cpu_cores']} cores")
    facts += [f"{package} {provenance.versions.get(package)}" for package in packages]
    if provenance.commit is not None:
        facts.append(f"commit {provenance.commit[:12]}")
    changes = " with uncommitted changes" if provenance.uncommitted_changes else ""
    lines = [f"`{provenance.command}`", f"{', '.join(facts)}{changes}."]
    if provenance.differing:
        differences = ", ".join(provenance.differing).replace("_", " ")
        lines.append(
            f"The runs differ in {json.dumps(differences)}; the lines above describe the first run."
        )
    return lines
