"""A result of ``eval.clip_scores`` image by image, as the Compare and Vote tabs look at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter

from bilora_diffusion.errors import UserError
from eval.clip_scores.prompts import Prompt
from eval.table import FILE, Result

NOTES = {"t2t": "caption", "nearest": "nearest_image"}
"""Metric -> the fact of an image that is the note beside its value."""
LARGEST_SEED = 2**53
"""JavaScript's whole numbers end there."""


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
    again = f"{FILE} is damaged: run python -m eval.{result.kind} again"
    try:
        scores = Scored(result, TypeAdapter(Settings).validate_python(result.settings))
    except ValueError as error:
        raise UserError(again) from error
    known = (label in scores.labels and text in scores.texts for label, text, _ in scores.images)
    seeds = [*scores.settings.seeds, *(seed for _, _, seed in scores.images)]
    if not all(known) or any(abs(seed) > LARGEST_SEED for seed in seeds):
        raise UserError(again)
    return scores
