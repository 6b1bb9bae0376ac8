"""A result of ``eval.clip_scores`` image by image, as the tabs Compare and Vote look at it; and
what Compare shows of it: scores per prompt, order, one view, its link.

No files and no widgets. Adapters are called by their labels and prompts by their texts, so that a
link survives scoring again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import urlencode

from pydantic import TypeAdapter

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.intervals import student_interval
from eval import compare
from eval.clip_scores.prompts import Prompt
from eval.clip_scores.reporting import METRICS
from eval.table import FILE, Result, Summary

NOTES = {"t2t": "caption", "nearest": "nearest_image"}
"""Metric -> the fact of an image that is the note beside its value."""
LARGEST_SEED = 2**53  # where JavaScript's whole numbers end


@dataclass(frozen=True)
class ScoredImage:
    """An image: its file relative to the result's folder, and what was measured of it."""

    file: str
    scores: Mapping[str, float]
    caption: str | None = None
    nearest_image: str | None = None


@dataclass(frozen=True)
class ScoringModel:
    """A scorer or captioner."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """The settings of a result that the viewer shows; a reference is a plain file name."""

    prompts: list[Prompt]
    seeds: list[int]
    scorer: ScoringModel
    captioner: ScoringModel | None


Key = tuple[str, str, int]
"""Label of the adapter, text of the prompt, seed."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A result and what its settings say; what is computed of one can be kept by it."""

    result: Result
    settings: Settings

    @property
    def labels(self) -> list[str]:
        """Labels of the adapters."""
        return [entry.label for entry in self.result.subjects]

    @cached_property
    def texts(self) -> list[str]:
        """Texts of the prompts."""
        return [prompt.text for prompt in self.settings.prompts]

    def prompt(self, text: str) -> Prompt:
        """The prompt of a text."""
        return self.settings.prompts[self.texts.index(text)]

    @cached_property
    def images(self) -> dict[Key, ScoredImage]:
        """All images."""
        images: dict[Key, dict[str, Any]] = {}
        for row in self.result.select("image"):
            images[row.subject, row.item, row.seed or 0] = {"file": row.note, "scores": {}}
        for row in self.result.rows:
            image = images.get((row.subject, row.item, row.seed or 0))
            if image is None or row.value is None:
                continue
            image["scores"][row.metric] = row.value
            if row.metric in NOTES:
                image[NOTES[row.metric]] = row.note
        return {key: ScoredImage(**image) for key, image in images.items()}


def scored(result: Result) -> Scored:
    """A result of ``eval.clip_scores``, its parts checked against one another."""
    damaged = f"{FILE} is damaged: run python -m eval.{result.kind} again"
    try:
        scores = Scored(result, TypeAdapter(Settings).validate_python(result.settings))
    except ValueError as error:
        raise UserError(damaged) from error
    is_known = (label in scores.labels and text in scores.texts for label, text, _ in scores.images)
    seeds = [*scores.settings.seeds, *(seed for _, _, seed in scores.images)]
    if not all(is_known) or any(abs(seed) > LARGEST_SEED for seed in seeds):
        raise UserError(damaged)
    return scores


ORDERS = {
    "gain": "Largest gain first",
    "loss": "Largest loss first",
    "name": "By name",
    "list": "As in the prompt set",
}
"""Orders of the prompts, by the change from the first adapter to the second."""


@dataclass(frozen=True)
class View:
    """One comparison on the screen; its link has the same parts in the same order.

    Args:
        scores: path of the score folder.
        a, b, also: adapters of the pair, whose change is b minus a, and those shown beside them.
        metric, order: by which the prompts are listed (:data:`ORDERS`).
        words: only prompts that contain all of these are listed.
    """

    scores: str
    a: str
    b: str
    also: tuple[str, ...]
    prompt: str
    seed: int
    metric: str
    order: str = "gain"
    words: str = ""

    @property
    def adapters(self) -> tuple[str, ...]:
        """All that are shown, each once, the pair first."""
        return tuple(dict.fromkeys((self.a, self.b, *self.also)))


@dataclass(frozen=True)
class PromptRow:
    """A prompt in the list; scores are means over the seeds that both adapters have.

    Args:
        position: its place among the prompts.
        name: the prompt's instance, where the prompt set says, else its text.
        tone: of the change, see :func:`tone`.
    """

    position: int
    name: str
    text: str
    a: float | None
    b: float | None
    tone: str = "even"

    @property
    def change(self) -> float | None:
        """b minus a."""
        return None if self.a is None or self.b is None else self.b - self.a


def metrics(result: Scored) -> list[str]:
    """Scores that any image has, in their usual order."""
    measured = {name for image in result.images.values() for name in image.scores}
    return [name for name in METRICS if name in measured]


def times_100(value: float | None) -> str:
    """A cosine as it is shown; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f}"


def tone(line: Summary | None) -> str:
    """A difference as "up" (better), "down", or "even", which chance alone explains."""
    metric_entry = METRICS.get(line.metric) if line else None
    judged = compare.verdict(line, metric_entry.higher_is_better) if line and metric_entry else None
    return {compare.BETTER: "up", compare.WORSE: "down"}.get(judged or "", "even")


@lru_cache(maxsize=16)
def rows(result: Scored, a: str, b: str, metric: str) -> list[PromptRow]:
    """All prompts with the pair's scores, in the prompt set's order."""
    values = [row for row in result.result.select(metric) if row.value is not None]
    seeds = {(row.subject, row.item, row.seed) for row in values}

    def counts(item: str, seed: int | None) -> bool:
        # A seed that one of the two lacks would make the difference one of noise.
        return (a, item, seed) in seeds and (b, item, seed) in seeds

    paired = {row.item for row in values if counts(row.item, row.seed)}
    values = [
        replace(row, group=row.subject)
        for row in values
        if row.subject in (a, b) and (row.item not in paired or counts(row.item, row.seed))
    ]
    summaries = compare.summaries(values, a, interval=student_interval)
    lines = {(s.group, s.item): s for s in summaries}

    def row(text: str) -> PromptRow:
        line_a, line_b = lines.get((a, text)), lines.get((b, text))
        return PromptRow(
            position=result.texts.index(text),
            name=result.prompt(text).instance or text,
            text=text,
            a=line_a.mean if line_a else None,
            b=line_b.mean if line_b else None,
            tone=tone(line_b),
        )

    with_image = {text for _, text, _ in result.images}
    return [row(text) for text in dict.fromkeys(result.texts) if text in with_image]


def listed(view: View, result: Scored) -> list[PromptRow]:
    """The prompts of a view, sorted and filtered; those without a score come last.

    A gain is a change for the better: for memorization, where lower is better, a decrease.
    """
    words = view.words.casefold().split()
    matching = [
        row
        for row in rows(result, view.a, view.b, view.metric)
        if all(word in row.text.casefold() for word in words)
    ]
    metric_entry = METRICS.get(view.metric)
    sign = -1 if metric_entry is not None and metric_entry.higher_is_better is False else 1
    sign = -sign if view.order == "gain" else sign
    keys = {
        "name": lambda row: row.name.casefold(),
        "list": lambda row: 0,
        "gain": lambda row: (row.change is None, sign * (row.change or 0.0), row.name.casefold()),
    }
    return sorted(matching, key=keys.get(view.order, keys["gain"]))


def neighbour(listed: Sequence[PromptRow], prompt: str, step: int) -> str:
    """The prompt ``step`` rows on, at most the last or first; the first when it is not listed."""
    order = [row.text for row in listed]
    if prompt not in order:
        return order[0] if order else prompt
    return order[min(max(order.index(prompt) + step, 0), len(order) - 1)]


def first_view(scores: str, result: Scored) -> View:
    """The view before anything is chosen: the first two adapters, the largest gain."""
    with_image = {label for label, _, _ in result.images}
    labels = [label for label in result.labels if label in with_image] or result.labels
    a, b = (labels * 2)[:2]
    metric, seeds = next(iter(metrics(result)), "i2t"), result.settings.seeds or [0]
    view = View(scores, a, b, tuple(labels[2:4]), next(iter(result.texts), ""), seeds[0], metric)
    order = listed(view, result)
    return replace(view, prompt=order[0].text) if order else view


def link(view: View) -> str:
    """The query that reopens a view, such as ``?scores=...&a=...&b=...&prompt=...&seed=...``."""
    words = {field.name: getattr(view, field.name) for field in fields(View)}
    words |= {"also": ",".join(view.also), "seed": str(view.seed)}
    return "?" + urlencode({key: value for key, value in words.items() if value})


def opened(query: Mapping[str, str], scores: str, result: Scored) -> tuple[View, list[str]]:
    """The view of a score folder that a :func:`link` asks for, of which every part may be missing;
    and a sentence for each part that is not there (any more).
    """
    first, missing = first_view(scores, result), []
    also = first.also
    if "a" in query:
        # Labels may hold commas, so they are looked for and the text is not cut apart.
        labels_of_link = f",{query.get('also', '')},"
        also = tuple(label for label in result.labels if f",{label}," in labels_of_link)
    choices: dict[str, Sequence[str]] = {
        "a": result.labels,
        "b": result.labels,
        "prompt": result.texts,
        "seed": [str(seed) for seed in result.settings.seeds],
        "metric": metrics(result),
        "order": list(ORDERS),
    }
    parts = {key: query[key] for key in choices if key in query}
    for key in [key for key, value in parts.items() if value not in choices[key]]:
        missing.append(f'The link names "{parts.pop(key)}" as {key}, which is not there.')
    seed = int(parts.pop("seed", first.seed))
    view = replace(first, **parts, seed=seed, words=query.get("words", ""))
    also = tuple(label for label in also if label not in (view.a, view.b))
    return replace(view, also=also), missing
