"""Scores for reading, in the shape of the paper's Tables 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import compare
from ..report import difference, escaped, listed, number, origin, page, section
from ..report import table as markdown
from ..subjects import BASE
from ..table import Metric, Result, Row, Summary
from .benchmarks import EFFECT, UNPARSED

FEW_SEEDS = 5
ABSENT = "–"


def to_markdown(result: Result) -> str:
    """The whole report."""
    titles = ", ".join(escaped(metric.title) for metric in columns(result).values())
    return page(
        f"# Text scores: {titles}",
        "\n\n".join(f"> {note}" for note in result.notes),
        section("Scores in the shape of the paper's Tables 1 to 3", table(result), legend()),
        section("Differences", *_differences(result)),
        section("Runs", _runs(result)),
        section("How it was asked", _asked(result)),
        section("How it was made", _origin(result)),
    )


def notes(rows: Sequence[Row], titles: Mapping[str, Metric], limit: int | None) -> list[str]:
    """What a reader has to know before the table.

    Args:
        limit: ``--limit``; None where all was asked.
    """
    told = []
    if limit is not None and any(row.item for row in rows):
        told.append(
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
            told.append(
                f"{metric.title}: in {unparsed} of {len(items)} items no answer could be read; they"
                f" {counted}."
            )
    idle = [row.subject for row in rows if row.metric.endswith(f" {EFFECT}") and row.value == 0]
    told += [
        f"The adapter of {label} is zero: it is the base model." for label in dict.fromkeys(idle)
    ]
    return told


def columns(result: Result) -> dict[str, Metric]:
    """The benchmarks, in the order of the tables."""
    return {name: result.metric(name) for name in result.settings["benchmarks"]}


def rows(result: Result) -> list[str]:
    """The groups, the base model first."""
    return sorted(result.groups, key=lambda group: _trained(result, group))


def table(result: Result) -> str:
    """Methods in rows, benchmarks in columns; the best trained row of each column in bold."""
    asked = columns(result)
    best = {name: _best(result, name) for name in asked}
    averaged = len(asked) > 1 and all(metric.scale == 100 for metric in asked.values())
    measured = any(entry.about.get("peak_memory") for entry in result.subjects)
    body = []
    for group in rows(result):
        lines = {name: result.summary(group, name) for name in asked}
        cells = [group, _cost(result, group), *([_memory(result, group)] if measured else [])]
        for name, line in lines.items():
            text = _cell(line, asked[name])
            bold = line is not None and _trained(result, group) and line.mean == best[name]
            cells.append(f"**{text}**" if bold else text)
        means = [line.mean for line in lines.values() if line is not None and line.mean is not None]
        if averaged:
            whole = len(means) == len(asked)
            cells.append(f"{100 * sum(means) / len(means):.2f}" if whole else ABSENT)
        body.append(cells)
    head = ["method", "cost", *(["peak memory"] if measured else [])]
    head += [
        m.title if m.higher_is_better else f"{m.title} (lower is better)" for m in asked.values()
    ]
    return markdown([*head, "avg."] if averaged else head, body)


def legend() -> str:
    """What the cells are."""
    return (
        "Mean ± standard error over seeds; without ± there is one run. Percentages, but for points"
        " and losses. Cost: gradient steps per training iteration. Peak memory: the most that a run"
        " took to train, on a CPU by its process. The best trained row in bold."
    )


def sentences(result: Result) -> list[str]:
    """One per comparison: better, worse, or no difference shown."""
    told = []
    for group in rows(result):
        for name, metric in columns(result).items():
            line = result.summary(group, name)
            if line is None or not line.pairs:
                continue
            verdict = compare.verdict(line, metric.higher_is_better)
            judged = (
                f"no difference between {group} and {line.control} is shown"
                if verdict == compare.UNDECIDED
                else f"{group} is {verdict} than {line.control}"
            )
            told.append(
                f"{metric.title}: {judged}: {difference(line, metric)} {line.over}s better."
            )
    return told


def _best(result: Result, name: str) -> float | None:
    """The best mean of several trained rows."""
    lines = [result.summary(group, name) for group in result.groups if _trained(result, group)]
    means = [line.mean for line in lines if line is not None and line.mean is not None]
    if len(means) < 2:
        return None
    return max(means) if result.metric(name).higher_is_better else min(means)


def _trained(result: Result, group: str) -> bool:
    return result.members(group)[0].kind != BASE


def _cell(line: Summary | None, metric: Metric) -> str:
    if line is None or line.mean is None:
        return ABSENT
    error = f" ± {number(line.error, metric)}" if line.count > 1 else ""
    return f"{number(line.mean, metric)}{error}"


def _cost(result: Result, group: str) -> str:
    costs = {entry.about.get("cost") for entry in result.members(group)}
    return f"×{costs.pop()}" if len(costs) == 1 and None not in costs else ABSENT


def _memory(result: Result, group: str) -> str:
    peak = max(entry.about.get("peak_memory") or 0 for entry in result.members(group))
    return f"{peak / 2**30:.2f} GiB" if peak else ABSENT


def _differences(result: Result) -> list[str]:
    told = sentences(result)
    if not told:
        return []
    text = (
        f"Row minus {escaped(str(result.control))}, with 95 % intervals of the mean: over seeds by"
        " bootstrap (BCa, 9999 resamples), over items (the same questions, where there are not two"
        " common seeds) by Student's t. Items say how sure a difference of these runs is, not what"
        " another seed would bring."
    )
    pairs = [line.pairs for line in result.summaries if line.control and line.over == compare.SEED]
    if pairs and min(pairs) < FEW_SEEDS:
        text += f" With fewer than {FEW_SEEDS} seeds a bootstrap interval is too narrow."
    return [text, listed(told)]


def _runs(result: Result) -> str:
    whole = [row for row in result.rows if not row.item]
    body = []
    for name, metric in columns(result).items():
        further: dict[str, list[str]] = {}
        for row in whole:
            if row.metric.startswith(f"{name} "):
                told = f"{row.metric.removeprefix(name)[1:]} {row.value:.4g}"
                further.setdefault(row.subject, []).append(told)
        for row in whole:
            if row.metric == name:
                seed = ABSENT if row.seed is None else str(row.seed)
                others = ", ".join(further.get(row.subject, []))
                body.append([row.subject, seed, metric.title, number(row.value, metric), others])
    return markdown(["run", "seed", "benchmark", "score", "further"], body)


def _asked(result: Result) -> str:
    lines = []
    for name, settings in result.settings["benchmarks"].items():
        words = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
        lines.append(f"{escaped(result.metric(name).title)}: {words}.")
    return listed(lines)


def _origin(result: Result) -> str:
    versions = result.provenance.versions if result.provenance else {}
    lines = origin(result.provenance, [name for name, version in versions.items() if version])
    for entry in result.subjects:
        quantize = entry.about.get("quantize")
        words = [entry.kind, entry.source, entry.method, f"on {entry.base_model}"]
        words += [quantize] if quantize not in (None, "none") else []
        words += [f"weights {entry.digest[:12]}"] if entry.digest else []
        lines.append(f"{escaped(entry.label)}: {', '.join(word for word in words if word)}.")
    return listed(lines)
