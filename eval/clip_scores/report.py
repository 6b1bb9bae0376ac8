"""A comparison for reading: ``report.md`` in the shape of Table 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import compare
from ..report import escaped, interval, number, origin, page, pictures, section, table
from ..table import Metric, Result, Summary

TABLE_ROWS = 6
"""The paper's Table 4 shows six prompts and the average over all."""
EXTREMES = 5
FEW_PROMPTS = 10
PAPER = ("i2t", "t2t")
BLANK = "–"
_RATE = Metric("win rate", scale=100, form=".1f")


def to_markdown(result: Result) -> str:
    """The whole report; all scores times 100."""
    return page(
        *_introduction(result),
        section("Scores in the shape of the paper's Table 4", scores(result)),
        section("Differences", *_differences(result)),
        section("Other scores", *_others(result)),
        section("Prompts with the largest differences", *_extremes(result)),
        section("Images that are most like a training picture", _memorized(result)),
        section("How it was made", _origin(result), pictures(result)),
    )


def names(result: Result) -> dict[str, str]:
    """Text of each scored prompt -> what a row is called: the instance, else the whole prompt."""
    prompts = result.settings["prompts"]
    return {p["text"]: p["instance"] or p["text"] for p in prompts if not p["general"]}


def per_prompt(result: Result, metric: str) -> dict[str, dict[str, float]]:
    """A score's mean over seeds, by group and prompt."""
    values = compare.units(result.select(metric), over="item")
    return {
        group: {str(text): value for text, value in own.items() if value is not None}
        for group, own in values.items()
    }


def scores(result: Result) -> str:
    """The first prompts and the average over all: a column per score and group, best in bold."""
    shown = [name for name in PAPER if result.select(name)]
    columns = [(name, group) for name in shown for group in result.groups]
    heads = [f"{result.metric(name).title} {group}" for name, group in columns]
    values = {name: per_prompt(result, name) for name in shown}
    named, rows = names(result), []
    for text in list(named)[:TABLE_ROWS]:
        of_prompt = [values[name].get(group, {}).get(text) for name, group in columns]
        rows.append([named[text], *_cells(result, columns, of_prompt)])
    lines = [result.summary(group, name) for name, group in columns]
    means = _cells(result, columns, [None if line is None else line.mean for line in lines])
    rows.append([f"average of {len(named)}", *means])
    return f"{_caption(result)}\n\n{table(['prompt', *heads], rows)}"


def _cells(
    result: Result, columns: Sequence[tuple[str, str]], values: Sequence[float | None]
) -> list[str]:
    """A row's cells; the best of each score in bold, several where they are equal."""
    best: dict[str, float] = {}
    for (name, _), value in zip(columns, values, strict=True):
        if value is not None:
            best[name] = max(value, best.get(name, value))
    cells = []
    for (name, _), value in zip(columns, values, strict=True):
        shown = BLANK if value is None else number(value, result.metric(name))
        cells.append(f"**{shown}**" if value is not None and value == best[name] else shown)
    return cells


def _caption(result: Result) -> str:
    """What the table's numbers are, with the names of scorer and captioner."""
    captioner, seeds = result.settings["captioner"], result.settings["seeds"]
    captions = f"; captions for T2T: {captioner['name']}" if captioner else "; T2T left out"
    return (
        "Cosines x 100, higher is better, best in bold. Scorer:"
        f" {result.settings['scorer']['name']}{captions}. Mean over"
        f" seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."
    )


def verdicts(result: Result) -> list[str]:
    """One sentence per group and score of the paper: better, worse, or no difference shown."""
    bases = {entry.group for entry in result.subjects if entry.kind == "base"}
    lines = (line for name in PAPER for line in _compared(result, name))
    return [_verdict(result, line) for line in lines if line.group not in bases]


def _compared(result: Result, name: str) -> list[Summary]:
    """The groups that were compared with the control in a score."""
    lines = [result.summary(group, name) for group in result.groups]
    return [line for line in lines if line is not None and line.pairs]


def _verdict(result: Result, line: Summary) -> str:
    metric, group, control = result.metric(line.metric), line.group, line.control
    judged, numbers = compare.verdict(line, metric.higher_is_better), _difference(line, metric)
    if line.difference_low is None:
        return (
            f"{metric.title}: one prompt shows no difference between {group} and {control}"
            f" ({numbers})."
        )
    if judged == compare.UNDECIDED:
        equal = " (all scores are equal)" if line.equal == line.pairs else ""
        return (
            f"{metric.title}: no difference between {group} and {control} is shown: {numbers}"
            f" includes 0{equal}."
        )
    does_not = "" if judged == compare.BETTER else f" {group} does not beat {control} here."
    return f"{metric.title}: {group} is {judged} than {control}: {numbers}.{does_not}"


def _difference(line: Summary, metric: Metric) -> str:
    ends = interval(line.difference_interval, metric, "+")
    return f"{number(line.difference, metric, '+')} {ends}"


def _introduction(result: Result) -> list[str]:
    settings = result.settings
    sampling, scorer, seeds = settings["sampling"], settings["scorer"], settings["seeds"]
    count = len(names(result))
    notes = [model["note"] for model in (scorer, settings["captioner"]) if model and model["note"]]
    if scorer["kind"] == "embedded":
        notes[: bool(scorer["note"])] = [
            f"These are scores of {scorer['name']}, a small model that knows icons only. They carry"
            " its name and are never set beside the paper's."
        ]
    if 1 < count < FEW_PROMPTS:
        notes.append(f"With fewer than {FEW_PROMPTS} prompts a bootstrap interval is too narrow.")
    return [
        f"# CLIP scores by {scorer['name']}: {escaped(', '.join(result.groups))}",
        f"{count} prompts ({settings['prompt_set']}), {len(seeds)} seed{'s' * (len(seeds) > 1)},"
        f" {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}, {sampling['size']}"
        f" pixels, base model {sampling['base_model']}. All adapters get the same prompts and the"
        " same initial noise.",
        *(f"> {note}" for note in dict.fromkeys([*notes, *result.notes])),
        "\n".join(f"- {escaped(sentence)}" for sentence in verdicts(result)),
    ]


def _differences(result: Result) -> list[str]:
    rows = []
    for group in result.groups:
        for name, metric in result.metrics.items():
            line = result.summary(group, name)
            if line is None or not line.pairs:
                continue
            ends = compare.win_rate_interval(line.higher, line.equal, line.lower)
            rows.append(
                [
                    group,
                    metric.title,
                    _difference(line, metric),
                    compare.verdict(line, metric.higher_is_better) or "",
                    f"{line.higher} / {line.equal} / {line.lower}",
                    f"{number(line.win_rate, _RATE)} % {interval(ends, _RATE)}",
                ]
            )
    if not rows:
        return []
    head = ["adapter", "score", "difference", "", "higher / equal / lower", "win rate"]
    legend = (
        f"Adapter minus {escaped(str(result.control))}, paired by prompt (each the mean over"
        " seeds), times 100, with 95 % intervals: of the mean by bootstrap over prompts (BCa, 9999"
        " resamples); of the win rate, (wins + ties / 2) / prompts, by Wilson's formula, or by"
        " bootstrap where there are ties. A win is a higher score, also where lower is better."
    )
    return [legend, table(head, rows)]


def _others(result: Result) -> list[str]:
    rows, legend = [], []
    for name, metric in result.metrics.items():
        lines = [result.summary(group, name) for group in result.groups]
        measured = [line for line in lines if line is not None]
        if name in PAPER or not measured:
            continue
        higher = metric.higher_is_better
        direction = "" if higher is None else "higher is better" if higher else "lower is better"
        cells = [
            f"{number(line.mean, metric)} {interval(line.interval, metric)}" if line else BLANK
            for line in lines
        ]
        rows.append([metric.title, direction, str(max(m.count for m in measured)), *cells])
        legend.append(f"- {metric.title}: {metric.explanation}.")
    if not rows:
        return []
    return [table(["score", "", "prompts", *result.groups], rows), "\n".join(legend)]


def _extremes(result: Result) -> list[str]:
    parts, bases = [], {entry.group for entry in result.subjects if entry.kind == "base"}
    for name in PAPER:
        metric, values = result.metric(name), per_prompt(result, name)
        for line in _compared(result, name):
            if line.group in bases:
                continue
            others = values[line.control]
            changes = {t: v - others[t] for t, v in values[line.group].items() if t in others}
            rows = _pairs(changes, names(result), metric)
            if rows:
                head = [f"{line.group} above {line.control}", f"{line.group} below {line.control}"]
                parts.append(f"{metric.title} x 100:\n\n{table(head, rows)}")
    return parts


def _pairs(
    changes: Mapping[str, float], named: Mapping[str, str], metric: Metric
) -> list[list[str]]:
    """The largest gains beside the largest losses."""
    ordered = sorted(changes, key=lambda text: -changes[text])  # stable: the set's order

    def shown(text: str, sign: int) -> str:
        change = f"{named[text]} {number(changes[text], metric, '+')}"
        return change if sign * changes[text] > 0 else BLANK

    pairs = zip(ordered[:EXTREMES], ordered[::-1][:EXTREMES], strict=True)
    rows = [[shown(up, 1), shown(down, -1)] for up, down in pairs]
    return [row for row in rows if row != [BLANK, BLANK]]


def _memorized(result: Result) -> str:
    rows = sorted(result.select("nearest"), key=lambda row: -(row.value or 0.0))[:EXTREMES]
    files = {(r.subject, r.item, r.seed): r.note for r in result.select("image")}
    lines = [
        [
            number(row.value, result.metric("nearest")),
            row.group,
            names(result)[row.item],
            str(row.seed),
            row.note,
            files[row.subject, row.item, row.seed],
        ]
        for row in rows
    ]
    head = ["cosine x 100", "adapter", "prompt", "seed", "training picture", "image"]
    return table(head, lines) if lines else ""


def _origin(result: Result) -> str:
    prompts, settings = result.settings["prompts"], result.settings
    command, *machine = origin(result.provenance, ("torch", "diffusers"))
    lines = [
        command,
        f"{sum(prompt['truncated'] for prompt in prompts)} of {len(prompts)} prompts are longer"
        " than the scorer's text encoder takes and were cut.",
    ]
    for role in ("scorer", "captioner"):
        if model := settings[role]:
            exact = ", ".join(filter(None, (model["kind"], model["model"], model["revision"])))
            lines.append(f"{role.capitalize()}: {model['name']} ({exact}).")
    for entry in result.subjects:
        source = "" if entry.kind == "base" else entry.source
        weights = entry.digest and f"weights {entry.digest[:12]}"
        parts = filter(None, (entry.kind, source, entry.method, weights))
        lines.append(f"{escaped(entry.label)}: {', '.join(parts)}.")
    return "\n".join(f"- {line}" for line in [*lines, *machine])
