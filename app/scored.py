"""A result of ``eval.clip_scores`` image by image, for the tabs Compare and Vote.

It has the images with their scores, and the data of Compare: scores of each prompt, their order,
one view, its link. There are no files and no widgets here. Adapters are named by their
labels and prompts by their texts, so that a link stays valid when the images are scored again.
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

# Metric -> field of `ScoredImage` for the note of its rows.
NOTES = {"t2t": "caption", "nearest": "nearest_image"}
# JavaScript has no larger whole numbers.
MAX_SEED = 2**53


@dataclass(frozen=True)
class ScoredImage:
    """An image: its file relative to the result's folder, and its scores."""

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
    """The settings of a result that the viewer shows."""

    prompts: list[Prompt]
    seeds: list[int]
    scorer: ScoringModel
    captioner: ScoringModel | None
    # Of each run whose checkpoints were scored
    answers: list[BestStep] = field(default_factory=list)


# Label of the adapter, text of the prompt, seed.
Key = tuple[str, str, int]


@dataclass(frozen=True, eq=False)
class Scored:
    """A result of scores with its settings; compared by identity, as the key of a cache."""

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
        """The prompt with a text."""
        return self.settings.prompts[self.texts.index(text)]

    @cached_property
    def images(self) -> dict[Key, ScoredImage]:
        """All images."""
        fields_of_image: dict[Key, dict[str, Any]] = {}
        # A row of the metric "image" has the file in its note; the other rows have the scores.
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


def scored(result: Result) -> Scored:
    """Check a result of ``eval.clip_scores``.

    Raises:
        UserError: its settings are damaged, or do not have the adapter, prompt or seed of an image.
    """
    damaged = f"{FILE} is damaged: run python -m eval.{result.kind} again"
    try:
        settings = TypeAdapter(Settings).validate_python(result.settings)
    except ValueError as error:
        raise UserError(damaged) from error
    scores = Scored(result, settings)
    seeds = list(settings.seeds)
    for label, text, seed in scores.images:
        if label not in scores.labels or text not in scores.texts:
            raise UserError(damaged)
        seeds.append(seed)
    if any(abs(seed) > MAX_SEED for seed in seeds):
        raise UserError(damaged)
    return scores


# Orders of the prompts; a gain is a change for the better from the first adapter to the second.
ORDERS = {
    "gain": "Largest gain first",
    "loss": "Largest loss first",
    "name": "By name",
    "list": "As in the prompt set",
}


@dataclass(frozen=True)
class View:
    """One comparison on the screen; its link has the same fields in the same order."""

    # Path of the score folder
    scores: str
    # Labels of the pair; the change is b minus a
    a: str
    b: str
    # Labels of further adapters that are shown
    also: tuple[str, ...]
    prompt: str
    seed: int
    # Metric of the list of prompts
    metric: str
    # Order of this list, one of `ORDERS`
    order: str = "gain"
    # Words that a listed prompt contains, all of them
    words: str = ""


@dataclass(frozen=True)
class PromptRow:
    """A prompt in the list; its scores are means over the seeds that both adapters have."""

    # Place among the prompts
    position: int
    # Instance of the prompt, if the prompt set has one, else its text
    name: str
    text: str
    # Scores of the two adapters
    a: float | None
    b: float | None
    # Tone of the change, see `tone`
    tone: str = "even"

    @property
    def change(self) -> float | None:
        """b minus a; None without both."""
        if self.a is None or self.b is None:
            return None
        return self.b - self.a


def metrics(result: Scored) -> list[str]:
    """Metrics that any image has, in their usual order."""
    measured: set[str] = set()
    for image in result.images.values():
        measured |= image.scores.keys()
    return [name for name in METRICS if name in measured]


def times_100(value: float | None) -> str:
    """A cosine times 100; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def tone(difference: Summary | None) -> str:
    """A difference as "up" (better), "down" (worse), or "even", which chance alone explains."""
    if difference is None or difference.metric not in METRICS:
        return "even"
    verdict = compare.verdict(difference, METRICS[difference.metric].higher_is_better)
    return {compare.BETTER: "up", compare.WORSE: "down"}.get(verdict or "", "even")


@lru_cache(maxsize=16)
def rows(result: Scored, a: str, b: str, metric: str) -> list[PromptRow]:
    """All prompts that have images, with the pair's scores, in the prompt set's order."""
    measured_rows = [row for row in result.result.select(metric) if row.value is not None]
    measured = {(row.subject, row.item, row.seed) for row in measured_rows}

    def is_paired(item: str, seed: int | None) -> bool:
        return (a, item, seed) in measured and (b, item, seed) in measured

    # A difference takes only the seeds that both adapters have: images of different seeds differ
    # by their noise as well. A prompt without a common seed still shows each adapter's own mean.
    paired_items = {row.item for row in measured_rows if is_paired(row.item, row.seed)}
    pair_rows = []
    for row in measured_rows:
        counts = row.item not in paired_items or is_paired(row.item, row.seed)
        if row.subject in (a, b) and counts:
            pair_rows.append(replace(row, group=row.subject))
    summaries = {}
    for summary in compare.summaries(pair_rows, a):
        summaries[summary.group, summary.item] = summary

    texts_with_image = {text for _, text, _ in result.images}
    prompt_rows = []
    for text in dict.fromkeys(result.texts):
        if text not in texts_with_image:
            continue
        summary_a = summaries.get((a, text))
        summary_b = summaries.get((b, text))
        row = PromptRow(
            position=result.texts.index(text),
            name=result.prompt(text).instance or text,
            text=text,
            a=summary_a.mean if summary_a else None,
            b=summary_b.mean if summary_b else None,
            tone=tone(summary_b),
        )
        prompt_rows.append(row)
    return prompt_rows


def listed(view: View, result: Scored) -> list[PromptRow]:
    """The prompts of a view, filtered and sorted; those without a score come last.

    A gain is a change for the better: for memorization, where lower is better, a decrease.
    """
    words = view.words.casefold().split()
    matching_rows = []
    for row in rows(result, view.a, view.b, view.metric):
        text = row.text.casefold()
        if all(word in text for word in words):
            matching_rows.append(row)
    if view.order == "list":
        return matching_rows
    if view.order == "name":
        return sorted(matching_rows, key=lambda row: row.name.casefold())

    metric = METRICS.get(view.metric)
    lower_is_better = metric is not None and metric.higher_is_better is False
    # Rows are sorted upwards, so that the largest gain is the lowest product.
    sign = -1 if lower_is_better else 1
    if view.order == "gain":
        sign = -sign

    def rank(row: PromptRow) -> tuple[bool, float, str]:
        return row.change is None, sign * (row.change or 0.0), row.name.casefold()

    return sorted(matching_rows, key=rank)


def neighbour(prompt_rows: Sequence[PromptRow], prompt: str, step: int) -> str:
    """The prompt `step` rows on, at most the last or the first; the first for one not listed."""
    texts = [row.text for row in prompt_rows]
    if prompt not in texts:
        return texts[0] if texts else prompt
    position = texts.index(prompt) + step
    return texts[min(max(position, 0), len(texts) - 1)]


def first_view(scores: str, result: Scored) -> View:
    """The view before anything is chosen: a pair of adapters, and the largest gain.

    Of checkpoints the pair is the last step and the one that the answer compares with it, by the
    score that decides, and all others are shown too; of other scores it is the first two adapters.
    """
    labels_with_image = {label for label, _, _ in result.images}
    labels = [label for label in result.labels if label in labels_with_image] or result.labels
    also = labels[2:4]
    metric = next(iter(metrics(result)), "i2t")
    pair = pair_of_steps(result)
    if pair is not None and set(pair) <= set(labels):
        also = [label for label in labels if label not in pair]
        labels = pair
        if result.settings.answers[0].metric in metrics(result):
            metric = result.settings.answers[0].metric
    view = View(
        scores,
        a=labels[0],
        b=labels[1] if len(labels) > 1 else labels[0],
        also=tuple(also),
        prompt=next(iter(result.texts), ""),
        seed=next(iter(result.settings.seeds), 0),
        metric=metric,
    )
    prompt_rows = listed(view, result)
    if not prompt_rows:
        return view
    return replace(view, prompt=prompt_rows[0].text)


def pair_of_steps(result: Scored) -> list[str] | None:
    """Labels of the last step and of the other one of the first answer; None without them."""
    if not result.settings.answers:
        return None
    answer = result.settings.answers[0]
    pair = []
    for step in (answer.last, answer.candidate):
        for entry in result.result.subjects:
            is_of_run = entry.about.get("run") == answer.run
            # Of several runs of one group, the first one's checkpoint
            if is_of_run and entry.about.get("step") == step:
                pair.append(entry.label)
                break
    return pair if len(pair) == 2 else None


def link(view: View) -> str:
    """The query that opens a view, such as ``?scores=...&a=...&b=...&prompt=...&seed=...``."""
    words = {}
    for name, value in vars(view).items():
        word = str(value)
        if name == "also":  # labels may have commas in them
            word = ",".join(quote(label, safe=" ") for label in view.also)
        if word:
            words[name] = word
    return "?" + urlencode(words)


def opened(query: Mapping[str, str], scores: str, result: Scored) -> tuple[View, list[str]]:
    """Read the view of a `link`, of which every part may be missing.

    Args:
        query: parts of the link.
        scores: path of the score folder.
        result: its scores.

    Returns:
        The view, and a sentence for each part that is not there (any more).
    """
    first = first_view(scores, result)
    also = first.also
    if "a" in query:
        labels_of_link = [unquote(word) for word in query.get("also", "").split(",")]
        also = tuple(label for label in result.labels if label in labels_of_link)
    choices: dict[str, Sequence[str]] = {
        "a": result.labels,
        "b": result.labels,
        "prompt": result.texts,
        "seed": [str(seed) for seed in result.settings.seeds],
        "metric": metrics(result),
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
            faults.append(f'The link names "{query[key]}" as {key}, which is not there.')
    if "seed" in values:
        values["seed"] = int(values["seed"])
    view = replace(first, **values, words=query.get("words", ""))
    also = tuple(label for label in also if label not in (view.a, view.b))
    return replace(view, also=also), faults
