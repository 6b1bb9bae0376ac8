"""Prompt embeddings, by the encoders of whatever kind of model, each computed once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from .families import of
from .families.base import Conditions, Family, joined, rows


def embed(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """Embed prompts with the pipeline's own text encoders as and where they are now."""
    return of(pipeline).embed(pipeline, prompts)


def embed_negative(pipeline: Any, count: int) -> Conditions:
    """Embeddings of ``count`` empty prompts with the pipeline's own text encoders."""
    return of(pipeline).negative(pipeline, embed(pipeline, [""] * count))


class PromptCache:
    """Embeddings of the prompts that frozen text encoders have seen, computed once each.

    Args:
        pipeline: with its encoders.
        device: where they are moved to for the while of embedding.
        family: the pipeline's kind, with the run's settings; its usual ones by default.
    """

    def __init__(self, pipeline: Any, device: torch.device, family: Family | None = None) -> None:
        self._pipeline, self._device = pipeline, device
        self.family = family or of(pipeline)
        self._known: dict[str, Conditions] = {}

    def add(self, prompts: Sequence[str], batch: int = 16) -> None:
        """Embed those of ``prompts`` that are new; the encoders visit the device for it only."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if not new:
            return
        encoders = self._encoders()
        for encoder in encoders:
            encoder.to(self._device)
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            embedded = rows(self.family.embed(self._pipeline, part))
            self._known |= dict(zip(part, embedded, strict=True))
        for encoder in encoders:
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of ``prompts`` on the CPU, in order."""
        self.add(prompts)
        return joined([self._known[prompt] for prompt in prompts])

    def release(self) -> None:
        """Let go of the encoders, of which those of a flow model are as large as the denoiser."""
        for name in self.family.encoders:
            setattr(self._pipeline, name, None)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _encoders(self) -> list[Any]:
        parts = (getattr(self._pipeline, name) for name in self.family.encoders)
        return [encoder for encoder in parts if encoder is not None]

    def with_negative(self, prompts: Sequence[str]) -> tuple[Conditions, Conditions]:
        """Embeddings of ``prompts`` and of as many empty ones, as ``sampling.generate`` takes."""
        empty = self([""] * len(prompts))
        return self(prompts), self.family.negative(self._pipeline, empty)
