"""A comparison for reading: ``report.md`` in the shape of Table 4, and ``scores.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from . import compare, markdown
from .schema import METRICS, Comparison, ImageScore, PromptEntry, ScoresResult

TABLE_ROWS = 6
"""The paper's Table 4 shows six prompts and the average over all."""
EXTREMES = 5
FEW_PROMPTS = 10
PAPER = ("i2t", "t2t")
OTHERS = tuple(name for name in METRICS if name not in PAPER)


def to_markdown(result: ScoresResult) -> str:
    """The whole report; all scores times 100."""
    sections = [
        _introduction(result),
        _section("Scores in the shape of the paper's Table 4", [table(result)]),
        _section("Differences", _differences(result)),
        _section("Other scores", _others(result)),
        _section("Prompts with the largest differences", _extremes(result)),
        _section("Images that are most like a training picture", _memorized(result)),
        _section("How it was made", _origin(result)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(result: ScoresResult) -> str:
    """The first prompts and the average over all: a column per score and adapter, best in bold."""
    shown = [name for name in PAPER if compare.summary(result, name)]
    columns = [(name, adapter) for name in shown for adapter in range(len(result.adapters))]
    heads = [f"{METRICS[name].title} {result.adapters[a].label}" for name, a in columns]
    prompts = [i for i, prompt in enumerate(result.prompts) if not prompt.general]
    scores = {name: compare.per_prompt(result, name) for name in shown}
    rows = []
    for i in prompts[:TABLE_ROWS]:
        of_prompt = {
            name: {a: found[i] for a, found in table.items() if i in found}
            for name, table in scores.items()
        }
        rows.append([prompt_name(result.prompts[i]), *_cells(columns, of_prompt)])
    means = {
        name: {a: row.mean for a, row in compare.summary(result, name).items()} for name in shown
    }
    rows.append([f"average of {len(prompts)}", *_cells(columns, means)])
    return f"{caption(result)}\n\n{markdown.table(['prompt', *heads], rows)}"


def caption(result: ScoresResult) -> str:
    """What the table's numbers are, with the names of scorer and captioner."""
    captioner = result.captioner
    captions = f"; captions for T2T: {captioner.name}" if captioner else "; T2T left out"
    seeds = ", ".join(map(str, result.seeds))
    return (
        f"Cosines x 100, higher is better, best in bold. Scorer: {result.scorer.name}{captions}."
        f" Mean over seed{'s' if len(result.seeds) > 1 else ''} {seeds}."
    )


def verdicts(result: ScoresResult) -> list[str]:
    """One sentence per adapter and score of the paper: better, worse, or no difference shown."""
    sentences = []
    for found in result.comparisons:
        if found.metric in PAPER and result.adapters[found.adapter].kind != "base":
            sentences.append(_verdict(result, found))
    return sentences


def _verdict(result: ScoresResult, found: Comparison) -> str:
    adapter, control = (result.adapters[i].label for i in (found.adapter, found.control))
    metric, said = METRICS[found.metric].title, compare.verdict(found)
    numbers = f"{markdown.signed(found.mean)} {markdown.interval(found.interval, '+.2f')}"
    if found.interval is None:
        return (
            f"{metric}: one prompt shows no difference between {adapter} and {control} ({numbers})."
        )
    if said == compare.UNDECIDED:
        equal = " (all scores are equal)" if found.ties == _count(found) else ""
        return (
            f"{metric}: no difference between {adapter} and {control} is shown: {numbers}"
            f" includes 0{equal}."
        )
    does_not = "" if said == compare.BETTER else f" {adapter} does not beat {control} here."
    return f"{metric}: {adapter} is {said} than {control}: {numbers}.{does_not}"


def _introduction(result: ScoresResult) -> str:
    labels = ", ".join(entry.label for entry in result.adapters)
    count = sum(not prompt.general for prompt in result.prompts)
    sampling = result.sampling
    paragraphs = [
        f"# CLIP scores by {result.scorer.name}: {markdown.escaped(labels)}",
        f"{count} prompts ({result.prompt_set}), {len(result.seeds)} seed"
        f"{'s' if len(result.seeds) > 1 else ''}, {sampling['steps']} steps, guidance"
        f" {sampling['guidance_scale']:g}, {sampling['size']} pixels, base model"
        f" {sampling['base_model']}. All adapters get the same prompts and the same initial noise.",
    ]
    notes = [entry.note for entry in (result.scorer, result.captioner) if entry and entry.note]
    if result.scorer.kind == "embedded":
        notes[: bool(result.scorer.note)] = [
            f"These are scores of {result.scorer.name}, a small model that knows icons only. They"
            " carry its name and are never set beside the paper's."
        ]
    if 1 < count < FEW_PROMPTS:
        notes.append(f"With fewer than {FEW_PROMPTS} prompts a bootstrap interval is too narrow.")
    paragraphs += [f"> {note}" for note in dict.fromkeys([*notes, *result.notes])]
    said = verdicts(result)
    if said:
        paragraphs.append("\n".join(f"- {markdown.escaped(sentence)}" for sentence in said))
    return "\n\n".join(paragraphs)


def _differences(result: ScoresResult) -> list[str]:
    if not result.comparisons:
        return []
    control = result.adapters[result.comparisons[0].control].label
    rows = [
        [
            result.adapters[found.adapter].label,
            METRICS[found.metric].title,
            f"{markdown.signed(found.mean)} {markdown.interval(found.interval, '+.2f')}",
            compare.verdict(found) or "",
            f"{found.wins} / {found.ties} / {found.losses}",
            f"{100 * found.win_rate:.1f} % {markdown.interval(found.win_rate_interval, '.1f')}",
        ]
        for found in sorted(result.comparisons, key=lambda row: row.adapter)
    ]
    head = ["adapter", "score", "difference", "", "higher / equal / lower", "win rate"]
    legend = (
        f"Adapter minus {markdown.escaped(control)}, paired by prompt (each the mean over seeds),"
        " times 100, with 95 % intervals: of the mean by bootstrap over prompts (BCa, 9999"
        " resamples); of the win rate, (wins + ties / 2) / prompts, by Wilson's formula, or by"
        " bootstrap where there are ties. A win is a higher score, also where lower is better."
    )
    return [legend, markdown.table(head, rows)]


def _others(result: ScoresResult) -> list[str]:
    shown = [name for name in OTHERS if compare.summary(result, name)]
    if not shown:
        return []
    rows, legend = [], []
    for name in shown:
        found = compare.summary(result, name)
        cells = [
            f"{markdown.value(row.mean)} {markdown.interval(row.interval)}" if row else "–"
            for row in (found.get(adapter) for adapter in range(len(result.adapters)))
        ]
        prompts = max(row.prompts for row in found.values())
        rows.append([METRICS[name].title, _direction(name), str(prompts), *cells])
        legend.append(f"- {METRICS[name].title}: {METRICS[name].explanation}.")
    head = ["score", "", "prompts", *(entry.label for entry in result.adapters)]
    return [markdown.table(head, rows), "\n".join(legend)]


def _direction(name: str) -> str:
    higher = METRICS[name].higher_is_better
    return "" if higher is None else "higher is better" if higher else "lower is better"


def _extremes(result: ScoresResult) -> list[str]:
    parts = []
    for found in result.comparisons:
        if found.metric not in PAPER or result.adapters[found.adapter].kind == "base":
            continue
        by_prompt = compare.differences(
            compare.per_prompt(result, found.metric), found.adapter, found.control
        )
        ordered = sorted(by_prompt, key=lambda prompt: (-by_prompt[prompt], prompt))
        adapter, control = (result.adapters[i].label for i in (found.adapter, found.control))
        pairs = zip(ordered[:EXTREMES], ordered[::-1][:EXTREMES], strict=True)
        rows = [
            [_one(result, up, by_prompt, 1), _one(result, down, by_prompt, -1)]
            for up, down in pairs
            if by_prompt[up] > 0 or by_prompt[down] < 0
        ]
        if not rows:
            continue
        head = [f"{adapter} above {control}", f"{adapter} below {control}"]
        title = f"{METRICS[found.metric].title} x 100:"
        parts.append(f"{title}\n\n{markdown.table(head, rows)}")
    return parts


def _one(result: ScoresResult, prompt: int, values: dict[int, float], sign: int) -> str:
    if sign * values[prompt] <= 0:
        return "–"
    return f"{prompt_name(result.prompts[prompt])} {markdown.signed(values[prompt])}"


def _memorized(result: ScoresResult) -> list[str]:
    images = [image for image in result.images if image.nearest is not None]
    if not images:
        return []
    ordered = sorted(images, key=lambda image: -(image.nearest or 0.0))[:EXTREMES]
    rows = [
        [
            markdown.value(image.nearest),
            result.adapters[image.adapter].label,
            prompt_name(result.prompts[image.prompt]),
            str(image.seed),
            image.nearest_image or "",
            image.file,
        ]
        for image in ordered
    ]
    head = ["cosine x 100", "adapter", "prompt", "seed", "training picture", "image"]
    return [markdown.table(head, rows)]


def _origin(result: ScoresResult) -> list[str]:
    made = result.provenance
    long = sum(prompt.truncated for prompt in result.prompts)
    lines = [
        f"- `{made.get('command', '')}`",
        f"- {long} of {len(result.prompts)} prompts are longer than the scorer's text encoder takes"
        " and were cut.",
    ]
    for role, entry in (("Scorer", result.scorer), ("Captioner", result.captioner)):
        if entry is not None:
            revision = f", {entry.revision}" if entry.revision else ""
            lines.append(f"- {role}: {entry.name} ({entry.kind}, {entry.model}{revision}).")
    for entry in result.adapters:
        what = [entry.kind, entry.source if entry.kind != "base" else "", entry.method or ""]
        digest = f"weights {entry.digest[:12]}" if entry.digest else ""
        lines.append(
            f"- {markdown.escaped(entry.label)}: {', '.join(w for w in [*what, digest] if w)}."
        )
    device, versions = made.get("device") or {}, made.get("versions") or {}
    commit = f", commit {made['commit'][:12]}" if made.get("commit") else ""
    changed = " with uncommitted changes" if made.get("uncommitted_changes") else ""
    used = f"torch {versions.get('torch')}, diffusers {versions.get('diffusers')}"
    lines.append(f"- {device.get('name') or 'unknown device'}, {used}{commit}{changed}.")
    figures = [f"![{name}]({name})" for name in result.figures]
    return ["\n".join(lines), *figures]


def to_csv(result: ScoresResult) -> str:
    """One row per image, unrounded; empty where a score does not apply."""
    text = io.StringIO()
    rows = [_csv_row(result, image) for image in result.images]
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["adapter"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(result: ScoresResult, image: ImageScore) -> dict[str, object]:
    adapter, prompt = result.adapters[image.adapter], result.prompts[image.prompt]
    return {
        "scorer": result.scorer.name,
        "adapter": adapter.label,
        "method": adapter.method,
        "prompt": prompt.text,
        "instance": prompt.instance,
        "general": prompt.general,
        "truncated": prompt.truncated,
        "seed": image.seed,
        "file": image.file,
        **{name: getattr(image, name) for name in METRICS if name != "diversity"},
        "caption": image.caption,
        "nearest_image": image.nearest_image,
    }


def prompt_name(prompt: PromptEntry) -> str:
    """What a row is called: the instance, else the whole prompt."""
    return prompt.instance or prompt.text


def _section(title: str, parts: Sequence[str]) -> str:
    return "\n\n".join([f"## {title}", *parts]) if parts else ""


def _cells(
    columns: Sequence[tuple[str, int]], values: Mapping[str, Mapping[int, float]]
) -> list[str]:
    """A row's cells; the best of each score in bold, several where they are equal."""
    best = {name: max(by_adapter.values(), default=None) for name, by_adapter in values.items()}
    cells = []
    for name, adapter in columns:
        value = values[name].get(adapter)
        shown = markdown.value(value)
        cells.append(f"**{shown}**" if value is not None and value == best[name] else shown)
    return cells


def _count(found: Comparison) -> int:
    return found.wins + found.ties + found.losses
