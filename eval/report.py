"""Results in Markdown: tables of groups, differences, verdicts on the paper's claims, origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .provenance import Provenance
from .table import Metric, Result, Summary

Interval = tuple[float, float]
UNKNOWN = "n/a"
INTERVALS = "its 95 % interval (bootstrap, BCa, 9999 resamples)"
AGREES, DISAGREES, IN_PART, UNCLEAR = "agrees", "disagrees", "in part", "unclear"
_WORDS = {
    AGREES: "These runs agree",
    DISAGREES: "These runs disagree",
    IN_PART: "These runs agree in part",
    UNCLEAR: "These runs do not decide it",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what could break it in a cell is escaped."""
    body = ["| " + " | ".join(escaped(cell) for cell in line) + " |" for line in [head, *rows]]
    return "\n".join([body[0], "|" + "---|" * len(head), *body[1:]])


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
    return UNKNOWN if value is None else f"{metric.scale * value:{sign}{metric.form}}"


def interval(ends: Interval | None, metric: Metric, sign: str = "") -> str:
    """An interval in brackets."""
    return "[" + ", ".join(number(end, metric, sign) for end in ends or [None]) + "]"


def mean(line: Summary | None, metric: Metric, intervals: bool = True) -> str:
    """A group's mean, with its interval."""
    if line is None or line.mean is None:
        return UNKNOWN
    text = number(line.mean, metric)
    return f"{text} {interval(line.interval, metric)}" if intervals else text


def difference(line: Summary | None, metric: Metric) -> str:
    """A mean difference with its interval, and in how many pairs the group is better."""
    if line is None or line.difference is None:
        return UNKNOWN
    text = (
        f"{number(line.difference, metric, '+')} {interval(line.difference_interval, metric, '+')}"
    )
    if metric.higher_is_better is None:
        return text
    return f"{text}, {line.better(metric.higher_is_better)}/{line.pairs}"


def comparison(
    result: Result,
    compared: Sequence[tuple[str, str]],
    alone: Sequence[tuple[str, str]] = (),
    *,
    intervals: bool = False,
    alone_intervals: bool = True,
    seeds: Callable[[str], str] | None = None,
) -> str:
    """The groups in rows, and for each metric its mean and its difference to the control's.

    Args:
        compared: metric and item of each column.
        alone: further ones, of which the mean is shown.
        intervals, alone_intervals: whether means are shown with theirs.
        seeds: what is said of a group's runs; by default how many there are.
    """
    head, rows = ["run", "seeds"], []
    for name, _ in compared:
        head += [result.metric(name).title, "difference"]
    head += [result.metric(name).title for name, _ in alone]
    for group in result.groups:
        is_control = group == result.control
        count = seeds(group) if seeds else str(len(result.members(group)))
        row = [f"{group} (control)" if is_control else group, count]
        for name, item in compared:
            line, metric = result.summary(group, name, item), result.metric(name)
            change = "" if is_control else difference(line, metric)
            if result.settings.get("paired", {}).get(group) is False:
                change = "not paired"
            row += [mean(line, metric, intervals), change]
        lines = [(result.summary(group, name, item), result.metric(name)) for name, item in alone]
        rows.append(row + [mean(line, metric, alone_intervals) for line, metric in lines])
    return table(head, rows)


def standard(result: Result, title: str) -> str:
    """A report of what any result has: the mean of each metric, figures, notes, origin."""
    names = list(
        dict.fromkeys((line.metric, line.item) for line in result.summaries if line.step is None)
    )
    return page(
        f"# {title}",
        f"Mean with {INTERVALS}.",
        comparison(result, [], names),
        closing(result),
    )


def pictures(result: Result) -> str:
    """The figures, one under another."""
    return "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in result.figures)


def closing(result: Result, packages: Sequence[str] = ("torch",)) -> str:
    """The end of a report: figures, notes, and where it comes from."""
    sentences = [*map(escaped, result.notes), *origin(result.provenance, packages)]
    return page(pictures(result), listed(sentences)).rstrip()


def origin(provenance: Provenance | None, packages: Sequence[str] = ("torch",)) -> list[str]:
    """Where a result comes from: command, machine, versions of some packages, commit."""
    if provenance is None:
        return []
    device = provenance.device
    cores = f", {device['cpu_cores']} cores" if device.get("type") == "cpu" else ""
    commit = "" if provenance.commit is None else f", commit {provenance.commit[:12]}"
    changed = " with uncommitted changes" if provenance.uncommitted_changes else ""
    versions = ", ".join(f"{one} {provenance.versions.get(one)}" for one in packages)
    name = device.get("name") or "unknown device"
    lines = [f"`{provenance.command}`", f"{name}{cores}, {versions}{commit}{changed}."]
    if provenance.differing:
        what = ", ".join(name.replace("_", " ") for name in provenance.differing)
        lines.append(f"The runs differ in {json.dumps(what)}; the first run's is given.")
    return lines


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, judged.

    Args:
        group: label of the runs it was judged by.
        source: figure.
        claim: what the paper says, in our words.
        verdict: "agrees", "disagrees", "in part", or "unclear" (the interval leaves both open, or
            there is one seed only).
        evidence: the figures that decide.
    """

    group: str
    source: str
    claim: str
    verdict: str
    evidence: str

    def sentence(self) -> str:
        """For the report."""
        judged = f"{_WORDS[self.verdict]} ({self.group})"
        return f"{self.source}: {self.claim}. {judged}: {self.evidence}."


def above(ends: Interval | None, limit: float) -> str:
    """Whether a figure lies above ``limit``, by its whole interval; without one it is unclear."""
    if ends is None:
        return UNCLEAR
    return AGREES if ends[0] > limit else DISAGREES if ends[1] < limit else UNCLEAR


def below(ends: Interval | None, limit: float) -> str:
    """Whether it lies below."""
    return {AGREES: DISAGREES, DISAGREES: AGREES, UNCLEAR: UNCLEAR}[above(ends, limit)]


def both(verdicts: Sequence[str]) -> str:
    """Agreement on every count, disagreement on any, else unclear."""
    if DISAGREES in verdicts:
        return DISAGREES
    return AGREES if set(verdicts) == {AGREES} else UNCLEAR


def claims(judged: Sequence[Claim]) -> str:
    """The claims' section, what disagrees first."""
    order = (DISAGREES, IN_PART, UNCLEAR, AGREES)
    ordered = sorted(judged, key=lambda claim: order.index(claim.verdict))
    return section("The paper's claims", listed([claim.sentence() for claim in ordered]))
