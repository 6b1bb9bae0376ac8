"""A result of ``eval.clip_scores`` image by image, as the Compare and Vote tabs look at it.

Adapters and prompts are called by their positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from eval.table import Entry, Result, Summary


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        instance: what it names, where the prompt set says.
        reference: file name of the held-out picture it describes, where one exists.
        general: asked to measure drift and in no other score.
    """

    text: str
    instance: str | None = None
    reference: str | None = None
    general: bool = False


@dataclass(frozen=True)
class ScoredImage:
    """An image: its file relative to the result's folder, and what was measured of it."""

    adapter: int
    prompt: int
    seed: int
    file: str
    scores: Mapping[str, float] = field(default_factory=dict)
    caption: str | None = None
    nearest_image: str | None = None


@dataclass(frozen=True)
class Model:
    """A scorer or captioner."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Scored:
    """All images, and each score's mean and difference to the control's."""

    adapters: Sequence[Entry]
    prompts: list[Prompt]
    images: list[ScoredImage]
    seeds: list[int]
    scorer: Model
    captioner: Model | None = None
    summaries: Sequence[Summary] = ()


@dataclass(frozen=True)
class _Settings:
    prompts: list[Prompt]
    seeds: list[int]
    scorer: Model
    captioner: Model | None


def scored(result: Result) -> Scored:
    """A result as images.

    Raises:
        ValueError: a part of its settings is missing.
        KeyError: a row is of no subject or prompt that it lists.
    """
    settings = _settings().validate_python(result.settings)
    adapters = {entry.label: at for at, entry in enumerate(result.subjects)}
    prompts = {prompt.text: at for at, prompt in reversed(list(enumerate(settings.prompts)))}
    images: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for row in result.rows:
        if row.metric == "image":
            place = {"adapter": adapters[row.subject], "prompt": prompts[row.item]}
            image = place | {"seed": row.seed or 0, "file": row.note, "scores": {}}
            images[row.subject, row.item, row.seed] = image
    for row in result.rows:
        image = images.get((row.subject, row.item, row.seed))
        if image is None or row.value is None:
            continue
        image["scores"][row.metric] = row.value
        if note := {"t2t": "caption", "nearest": "nearest_image"}.get(row.metric):
            image[note] = row.note
    return Scored(
        result.subjects,
        settings.prompts,
        [ScoredImage(**image) for image in images.values()],
        settings.seeds,
        settings.scorer,
        settings.captioner,
        result.summaries,
    )


@cache
def _settings() -> TypeAdapter[_Settings]:
    return TypeAdapter(_Settings)
