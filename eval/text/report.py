"""Scores for reading: ``report.md`` in the shape of the paper's Tables 1 to 3, and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .. import markdown
from . import compare
from .schema import PERCENT, BenchmarkEntry, Comparison, Score, Summary, TextScores

FEW_SEEDS = 5


def to_markdown(result: TextScores) -> str:
    """The whole report; shares times 100."""
    notes = [f"> {note}" for note in result.notes]
    sections = [
        f"# Text scores: {', '.join(markdown.escaped(c.title) for c in result.benchmarks)}",
        "\n\n".join(notes),
        _section("Scores in the shape of the paper's Tables 1 to 3", [table(result), legend()]),
        _section("Differences", _differences(result)),
        _section("Runs", [_runs(result)]),
        _section("How it was asked", [_asked(result)]),
        _section("How it was made", [_origin(result)]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(result: TextScores) -> str:
    """Methods in rows, benchmarks in columns; the best trained row of each column in bold."""
    shown = {(s.group, s.benchmark): s for s in result.summaries}
    names = compare.rows(result.runs)
    trained = {run.group for run in result.runs if run.kind != compare.BASE}
    best = [_best(result, benchmark, trained) for benchmark in range(len(result.benchmarks))]
    averaged, measured = _can_average(result), any(run.peak_memory for run in result.runs)
    body = []
    for name in names:
        cells = []
        for benchmark, column in enumerate(result.benchmarks):
            found = shown.get((name, benchmark))
            text = _cell(found, column)
            bold = found is not None and name in trained and found.mean == best[benchmark]
            cells.append(f"**{text}**" if bold else text)
        if averaged:
            cells.append(_average(result, [shown.get((name, b)) for b in range(len(best))]))
        memory = [_memory(result, name)] if measured else []
        body.append([name, _cost(result, name), *memory, *cells])
    head = ["method", "cost", *(["peak memory"] if measured else [])]
    head += [_head(column) for column in result.benchmarks]
    return markdown.table([*head, "avg."] if averaged else head, body)


def legend() -> str:
    """What the cells are."""
    return (
        "Mean ± standard error over seeds; without ± there is one run. Percentages, but for points"
        " and losses. Cost: gradient steps per training iteration. Peak memory: the most that a run"
        " took to train, on a CPU by its process. The best trained row in bold."
    )


def sentences(result: TextScores) -> list[str]:
    """One per comparison: better, worse, or no difference shown."""
    return [_sentence(result, found) for found in result.comparisons]


def to_csv(result: TextScores) -> str:
    """One row per run and benchmark, unrounded."""
    text = io.StringIO()
    heads = ["run", "group", "kind", "method", "seed", "training_set", "base_model", "quantize"]
    names = [
        *heads,
        "cost",
        "peak_memory",
        "benchmark",
        "metric",
        "unit",
        "value",
        "items",
        "unparsed",
        "others",
    ]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(result, score) for score in result.scores)
    return text.getvalue()


def _csv_row(result: TextScores, score: Score) -> dict[str, object]:
    run, column, found = result.runs[score.run], result.benchmarks[score.benchmark], score.measured
    others = "; ".join(f"{name}={value!r}" for name, value in found.others.items())
    return {
        "run": run.name,
        "group": run.group,
        "kind": run.kind,
        "method": run.method,
        "seed": run.seed,
        "training_set": run.training_set,
        "base_model": run.base_model,
        "quantize": run.quantize,
        "cost": run.cost,
        "peak_memory": run.peak_memory,
        "benchmark": column.name,
        "metric": column.metric,
        "unit": column.unit,
        "value": repr(found.value),
        "items": len(found.items),
        "unparsed": found.unparsed,
        "others": others,
    }


def _best(result: TextScores, benchmark: int, trained: set[str]) -> float | None:
    """The best mean of several trained rows."""
    means = [s.mean for s in result.summaries if s.benchmark == benchmark and s.group in trained]
    if len(means) < 2:
        return None
    return max(means) if result.benchmarks[benchmark].higher_is_better else min(means)


def _can_average(result: TextScores) -> bool:
    return len(result.benchmarks) > 1 and all(c.unit == PERCENT for c in result.benchmarks)


def _average(result: TextScores, cells: Sequence[Summary | None]) -> str:
    values = [cell.mean for cell in cells if cell is not None]
    return f"{100 * sum(values) / len(values):.2f}" if len(values) == len(cells) else "–"


def _cell(found: Summary | None, column: BenchmarkEntry) -> str:
    if found is None:
        return "–"
    scale = _scale(column)
    digits = 2 if column.unit == PERCENT or column.higher_is_better else 4
    error = f" ± {scale * found.error:.{digits}f}" if found.runs > 1 else ""
    return f"{scale * found.mean:.{digits}f}{error}"


def _scale(column: BenchmarkEntry) -> float:
    return 100.0 if column.unit == PERCENT else 1.0


def _head(column: BenchmarkEntry) -> str:
    return column.title if column.higher_is_better else f"{column.title} (lower is better)"


def _cost(result: TextScores, group: str) -> str:
    costs = {run.cost for run in result.runs if run.group == group}
    known = costs - {None}
    return f"×{known.pop()}" if len(known) == 1 and len(costs) == 1 else "–"


def _memory(result: TextScores, group: str) -> str:
    peak = max(run.peak_memory or 0 for run in result.runs if run.group == group)
    return f"{peak / 2**30:.2f} GiB" if peak else "–"


def _differences(result: TextScores) -> list[str]:
    if not result.comparisons:
        return []
    body = []
    for found in result.comparisons:
        column = result.benchmarks[found.benchmark]
        body.append(
            [
                found.group,
                column.title,
                _numbers(found, column),
                verdict(found, column),
                f"{found.better} of {found.pairs} {found.over}",
            ]
        )
    control = markdown.escaped(result.comparisons[0].control)
    few = any(f.over == compare.SEEDS and f.pairs < FEW_SEEDS for f in result.comparisons)
    text = (
        f"Row minus {control}, with 95 % intervals of the mean: over seeds by bootstrap (BCa, 9999"
        " resamples), over items (the same questions, where there are not two common seeds) by"
        " Student's t. Items say how sure a difference of these runs is, not what another seed"
        " would bring."
    )
    if few:
        text += f" With fewer than {FEW_SEEDS} seeds a bootstrap interval is too narrow."
    return [text, markdown.table(["method", "benchmark", "difference", "", "better"], body)]


def verdict(found: Comparison, column: BenchmarkEntry) -> str:
    """Whether the interval shows the row better or worse."""
    if found.interval is None or found.interval.low <= 0 <= found.interval.high:
        return "no difference shown"
    return "better" if (found.mean > 0) == column.higher_is_better else "worse"


def _numbers(found: Comparison, column: BenchmarkEntry) -> str:
    digits, scale = (2, 100.0) if column.unit == PERCENT else (4, 1.0)
    text = "[n/a]"
    if found.interval is not None:
        low, high = scale * found.interval.low, scale * found.interval.high
        text = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{scale * found.mean:+.{digits}f} {text}"


def _sentence(result: TextScores, found: Comparison) -> str:
    column = result.benchmarks[found.benchmark]
    said = verdict(found, column)
    numbers = f"{_numbers(found, column)} over {found.pairs} {found.over}"
    if said.startswith("no"):
        return (
            f"{column.title}: no difference between {found.group} and {found.control} is shown:"
            f" {numbers}."
        )
    return f"{column.title}: {found.group} is {said} than {found.control}: {numbers}."


def _runs(result: TextScores) -> str:
    body = []
    for score in result.scores:
        run, column = result.runs[score.run], result.benchmarks[score.benchmark]
        found = score.measured
        digits = 2 if column.higher_is_better else 4
        body.append(
            [
                run.name,
                "–" if run.seed is None else str(run.seed),
                column.title,
                f"{_scale(column) * found.value:.{digits}f}",
                str(len(found.items)) if found.items else "–",
                str(found.unparsed) if found.items else "–",
                ", ".join(f"{name} {value:.4g}" for name, value in found.others.items()),
            ]
        )
    head = ["run", "seed", "benchmark", "score", "items", "without an answer", "other metrics"]
    return markdown.table(head, body)


def _asked(result: TextScores) -> str:
    lines = []
    for column in result.benchmarks:
        settings = ", ".join(
            f"{name} {value}" for name, value in column.settings.items() if value is not None
        )
        lines.append(f"- {markdown.escaped(column.title)}: {column.metric}; {settings}.")
    details = {
        f"- {result.benchmarks[s.benchmark].title}: programs ran under {', '.join(layers)}."
        for s in result.scores
        if (layers := s.measured.details.get("sandbox"))
    }
    return "\n".join([*lines, *sorted(details)])


def _origin(result: TextScores) -> str:
    made = result.provenance
    lines = [f"- `{made.get('command', '')}`"]
    for run in result.runs:
        what = [run.kind, run.source, run.method or "", f"on {run.base_model}"]
        what += [run.quantize] if run.quantize != "none" else []
        what += [f"weights {run.digest[:12]}"] if run.digest else []
        lines.append(f"- {markdown.escaped(run.name)}: {', '.join(w for w in what if w)}.")
    versions = made.get("versions") or {}
    used = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
    commit = f"; commit {made['commit'][:12]}" if made.get("commit") else ""
    changed = " with uncommitted changes" if made.get("uncommitted_changes") else ""
    device = (made.get("device") or {}).get("name") or "unknown device"
    lines.append(f"- {device}; {used}{commit}{changed}.")
    return "\n".join(lines)


def _section(title: str, parts: Sequence[str]) -> str:
    return "\n\n".join([f"## {title}", *parts]) if parts else ""
