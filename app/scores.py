"""Scores of single images from a result of ``eval.clip_scores``, for the tab Compare.

`Scores` contains the images with their scores, `PromptRow` compares two adapters on one prompt, and
`View` is the comparison on the screen, which a link can reproduce. This module uses neither files
nor widgets. A link refers to adapters by label and to prompts by text, so it stays valid when the
images are scored again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import quote, unquote, urlencode

from pydantic import TypeAdapter

from bilora_diffusion.core.errors import UserError
from eval.clip_scores.best_step import BestStep
from eval.clip_scores.prompts import Prompt
from eval.clip_scores.reporting import METRICS
from eval.results import compare
from eval.results.table import FILE, Result, Summary

# Metric -> field of `ScoredImage` for the note of the metric's rows
NOTES = {"t2t": "caption", "nearest": "nearest_image"}
# Maximum seed; JavaScript rounds larger integers.
MAX_SEED = 2**53


@dataclass(frozen=True)
class ScoredImage:
    """An image with its scores."""

    # Path relative to the result's folder
    file: str
    # Metric -> score
    scores: Mapping[str, float]
    caption: str | None = None
    # Name of the nearest training picture
    nearest_image: str | None = None


@dataclass(frozen=True)
class ScoringModel:
    """A model that scored or captioned the images."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """The part of a result's settings that the viewer uses."""

    prompts: list[Prompt]
    seeds: list[int]
    scorer: ScoringModel
    captioner: ScoringModel | None
    # Best step of each run whose checkpoints were scored
    answers: list[BestStep] = field(default_factory=list)


# Label of the adapter, text of the prompt, seed
Key = tuple[str, str, int]


@dataclass(frozen=True, eq=False)
class Scores:
    """A result of ``eval.clip_scores`` with its settings.

    Objects are compared by identity, because they are keys of a cache.
    """

    result: Result
    settings: Settings

    @property
    def labels(self) -> list[str]:
        """Labels of the adapters, in the order of the command."""
        return [entry.label for entry in self.result.subjects]

    @cached_property
    def texts(self) -> list[str]:
        """Texts of the prompts, in the order of the prompt set."""
        return [prompt.text for prompt in self.settings.prompts]

    def prompt(self, text: str) -> Prompt:
        """Return the prompt with this text."""
        return self.settings.prompts[self.texts.index(text)]

    @cached_property
    def images(self) -> dict[Key, ScoredImage]:
        """Images by adapter, prompt and seed, each with all of its scores."""
        fields_of_image: dict[Key, dict[str, Any]] = {}
        # The note of an "image" row is the path of the file; the other rows contain the scores.
        for row in self.result.select("image"):
            key = (row.subject, row.item, row.seed or 0)
            fields_of_image[key] = {"file": row.note, "scores": {}}
        for row in self.result.rows:
            image_fields = fields_of_image.get((row.subject, row.item, row.seed or 0))
            if image_fields is None or row.value is None:
                continue
            image_fields["scores"][row.metric] = row.value
            if row.metric in NOTES:
                image_fields[NOTES[row.metric]] = row.note
        return {key: ScoredImage(**values) for key, values in fields_of_image.items()}


def read_scores(result: Result) -> Scores:
    """Check a result of ``eval.clip_scores`` and read its settings.

    Raises:
        UserError: the settings are damaged, lack the adapter or prompt of an image, or contain a
            seed that is too large.
    """
    damaged = f"{FILE} is damaged: run python -m eval.{result.kind} again"
    try:
        settings = TypeAdapter(Settings).validate_python(result.settings)
    except ValueError as error:
        raise UserError(damaged) from error
    scores = Scores(result, settings)
    seeds = list(settings.seeds)
    for label, text, seed in scores.images:
        if label not in scores.labels or text not in scores.texts:
            raise UserError(damaged)
        seeds.append(seed)
    if any(abs(seed) > MAX_SEED for seed in seeds):
        raise UserError(damaged)
    return scores


# Orders of the prompts. A gain is an improvement from the first adapter to the second.
ORDERS = {
    "gain": "Largest gain from A to B first",
    "loss": "Largest loss from A to B first",
    "name": "By name",
    "list": "As in the prompt set",
}


@dataclass(frozen=True)
class View:
    """A comparison on the screen; the query of its link has the same fields in the same order."""

    # Path of the score folder
    scores: str
    # Labels of the pair; changes are b minus a
    a: str
    b: str
    # Labels of the other adapters on the screen
    also: tuple[str, ...]
    prompt: str
    seed: int
    # Metric of the scores in the list of prompts
    metric: str
    # Order of this list, one of `ORDERS`
    order: str = "gain"
    # Words that every listed prompt contains
    words: str = ""


@dataclass(frozen=True)
class PromptRow:
    """A prompt in the list, with the mean scores of two adapters."""

    # Position in the prompt set
    position: int
    # Instance of the prompt, or the text if the prompt has no instance
    name: str
    text: str
    # Mean scores of the two adapters over their common seeds, or over each adapter's own seeds if
    # there are no common ones; None if there is no score
    a: float | None
    b: float | None
    # Classification of the change by `classify`
    tone: str = "even"

    @property
    def change(self) -> float | None:
        """b minus a; None if one of them is missing."""
        if self.a is None or self.b is None:
            return None
        return self.b - self.a


def measured_metrics(scores: Scores) -> list[str]:
    """Return the names of the metrics that at least one image has, in the order of `METRICS`."""
    names: set[str] = set()
    for image in scores.images.values():
        names |= image.scores.keys()
    return [name for name in METRICS if name in names]


def times_100(value: float | None) -> str:
    """Format a cosine times 100; None becomes a dash."""
    return "–" if value is None else f"{100 * value:.2f}"


def classify(difference: Summary | None) -> str:
    """Classify a difference as "up" (better), "down" (worse), or "even" (may be chance)."""
    if difference is None or difference.metric not in METRICS:
        return "even"
    verdict = compare.verdict(difference, METRICS[difference.metric].higher_is_better)
    return {compare.BETTER: "up", compare.WORSE: "down"}.get(verdict or "", "even")


@lru_cache(maxsize=16)
def compare_prompts(scores: Scores, a: str, b: str, metric: str) -> list[PromptRow]:
    """Compare two adapters on each prompt that has images, in the order of the prompt set."""
    measured_rows = [row for row in scores.result.select(metric) if row.value is not None]
    measured = {(row.subject, row.item, row.seed) for row in measured_rows}

    def is_paired(item: str, seed: int | None) -> bool:
        return (a, item, seed) in measured and (b, item, seed) in measured

    # A difference uses only the common seeds of both adapters, because images of different seeds
    # also differ in their noise. Without a common seed, a prompt still gets each adapter's mean.
    paired_items = {row.item for row in measured_rows if is_paired(row.item, row.seed)}
    pair_rows = []
    for row in measured_rows:
        is_used = row.item not in paired_items or is_paired(row.item, row.seed)
        if row.subject in (a, b) and is_used:
            pair_rows.append(replace(row, group=row.subject))
    summaries = {}
    for summary in compare.summaries(pair_rows, a):
        summaries[summary.group, summary.item] = summary

    texts_with_image = {text for _, text, _ in scores.images}
    prompt_rows = []
    for text in dict.fromkeys(scores.texts):
        if text not in texts_with_image:
            continue
        summary_a = summaries.get((a, text))
        summary_b = summaries.get((b, text))
        row = PromptRow(
            position=scores.texts.index(text),
            name=scores.prompt(text).instance or text,
            text=text,
            a=summary_a.mean if summary_a else None,
            b=summary_b.mean if summary_b else None,
            tone=classify(summary_b),
        )
        prompt_rows.append(row)
    return prompt_rows


def list_prompts(view: View, scores: Scores) -> list[PromptRow]:
    """Filter and sort the prompts of a view; if sorted by gain or loss, unscored ones come last.

    A gain is an improvement: a decrease if lower is better, as for memorization.
    """
    words = view.words.casefold().split()
    matching_rows = []
    for row in compare_prompts(scores, view.a, view.b, view.metric):
        text = row.text.casefold()
        if all(word in text for word in words):
            matching_rows.append(row)
    if view.order == "list":
        return matching_rows
    if view.order == "name":
        return sorted(matching_rows, key=lambda row: row.name.casefold())

    metric = METRICS.get(view.metric)
    lower_is_better = metric is not None and metric.higher_is_better is False
    # The sign makes ascending order put the requested rows first.
    sign = -1 if lower_is_better else 1
    if view.order == "gain":
        sign = -sign

    def rank(row: PromptRow) -> tuple[bool, float, str]:
        return row.change is None, sign * (row.change or 0.0), row.name.casefold()

    return sorted(matching_rows, key=rank)


def find_neighbor(prompt_rows: Sequence[PromptRow], prompt: str, offset: int) -> str:
    """Return the prompt `offset` rows below a prompt, but not beyond the ends of the list.

    If the prompt is not in the list, return the list's first prompt.
    """
    texts = [row.text for row in prompt_rows]
    if prompt not in texts:
        return texts[0] if texts else prompt
    position = texts.index(prompt) + offset
    return texts[min(max(position, 0), len(texts) - 1)]


def first_view(path: str, scores: Scores) -> View:
    """Return the view that is shown before the user chooses, with the prompt of the largest gain.

    For checkpoints of a run, the pair is the last and the best step by the deciding metric, and all
    other checkpoints are also shown. Otherwise, the pair is the first two adapters, and the next
    two are also shown.

    Args:
        path: path of the score folder.
        scores: its scores.
    """
    labels_with_image = {label for label, _, _ in scores.images}
    labels = [label for label in scores.labels if label in labels_with_image] or scores.labels
    also = labels[2:4]
    metric = next(iter(measured_metrics(scores)), "i2t")
    pair = last_and_best_step(scores)
    if pair is not None and set(pair) <= set(labels):
        also = [label for label in labels if label not in pair]
        labels = pair
        if scores.settings.answers[0].metric in measured_metrics(scores):
            metric = scores.settings.answers[0].metric
    view = View(
        path,
        a=labels[0],
        b=labels[1] if len(labels) > 1 else labels[0],
        also=tuple(also),
        prompt=next(iter(scores.texts), ""),
        seed=next(iter(scores.settings.seeds), 0),
        metric=metric,
    )
    prompt_rows = list_prompts(view, scores)
    if not prompt_rows:
        return view
    return replace(view, prompt=prompt_rows[0].text)


def last_and_best_step(scores: Scores) -> list[str] | None:
    """Return the labels of the first run's last and best step; None unless they were scored."""
    if not scores.settings.answers:
        return None
    answer = scores.settings.answers[0]
    pair = []
    for step in (answer.last, answer.candidate):
        for entry in scores.result.subjects:
            is_of_run = entry.about.get("run") == answer.run
            # If a group has several runs, take the first run's checkpoint.
            if is_of_run and entry.about.get("step") == step:
                pair.append(entry.label)
                break
    return pair if len(pair) == 2 else None


def write_query(view: View) -> str:
    """Write the query of a link that opens a view, such as ``?scores=...&a=...&b=...&seed=...``."""
    words = {}
    for name, value in vars(view).items():
        word = str(value)
        if name == "also":  # labels may contain commas
            word = ",".join(quote(label, safe=" ") for label in view.also)
        if word:
            words[name] = word
    return "?" + urlencode(words)


def read_query(query: Mapping[str, str], path: str, scores: Scores) -> tuple[View, list[str]]:
    """Read the view of a link; missing fields are taken from `first_view`.

    Args:
        query: fields of the link's query, as written by `write_query`.
        path: path of the score folder.
        scores: its scores.

    Returns:
        The view, and a sentence for each value in the query that the scores do not contain.
    """
    first = first_view(path, scores)
    also = first.also
    if "a" in query:
        labels_of_link = [unquote(word) for word in query.get("also", "").split(",")]
        also = tuple(label for label in scores.labels if label in labels_of_link)
    choices: dict[str, Sequence[str]] = {
        "a": scores.labels,
        "b": scores.labels,
        "prompt": scores.texts,
        "seed": [str(seed) for seed in scores.settings.seeds],
        "metric": measured_metrics(scores),
        "order": list(ORDERS),
    }
    values: dict[str, Any] = {}
    faults = []
    for key, choice in choices.items():
        if key not in query:
            continue
        if query[key] in choice:
            values[key] = query[key]
        else:
            faults.append(f'The link has the {key} "{query[key]}", which does not exist.')
    if "seed" in values:
        values["seed"] = int(values["seed"])
    view = replace(first, **values, words=query.get("words", ""))
    also = tuple(label for label in also if label not in (view.a, view.b))
    return replace(view, also=also), faults
