"""Prompt embeddings, by the encoders of whatever kind of model, each computed once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE
from .disk_cache import DiskCache
from .families import family_of
from .families.base import Conditions, Family, join_rows, split_rows
from .guidance import encoders_of_base


def embed(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """Embed prompts with the pipeline's own text encoders as and where they are now."""
    return family_of(pipeline).embed(pipeline, prompts)


def embed_negative(
    pipeline: Any,
    count: int,
    prompts: Sequence[str] = (),
    guidance_from: str = ADAPTER_GUIDANCE,
) -> Conditions:
    """Embeddings of ``count`` negative prompts, empty ones unless given, with the pipeline's own
    text encoders: as they are now, or without their adapters for the base model's prediction.
    """
    family = family_of(pipeline)
    is_base = guidance_from == BASE_GUIDANCE
    with encoders_of_base(family, pipeline) if is_base else nullcontext():
        empty = family.negative(pipeline, embed(pipeline, [""] * count))
        if not any(prompts):
            return empty
        rows = split_rows(embed(pipeline, prompts))
    # An empty prompt is what guidance leads away from, not the embedding of "".
    for number, (prompt, empty_row) in enumerate(zip(prompts, split_rows(empty), strict=True)):
        if not prompt:
            rows[number] = empty_row
    return join_rows(rows)


class PromptCache:
    """Embeddings of the prompts that frozen text encoders have seen, computed once each.

    Args:
        pipeline: with its encoders.
        device: where they are moved to for the while of embedding.
        family: of the pipeline, with the run's settings; its usual ones by default.
        disk: where embeddings stay for the next run.
        prepare: called before the encoders are used.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        family: Family | None = None,
        disk: DiskCache | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._pipeline, self._device = pipeline, device
        self.family = family or family_of(pipeline)
        self._disk, self._prepare = disk or DiskCache(), prepare
        self._embeddings: dict[str, Conditions] = {}

    def add(self, prompts: Sequence[str]) -> None:
        """Embed those of ``prompts`` that are new; the encoders visit the device for it only.

        Each on its own, so that the result does not depend on what else was new.
        """
        missing = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._embeddings:
                continue
            if parts := self._disk.get(prompt):  # of an earlier run
                self._embeddings[prompt] = _row_of_tensors(parts)
            else:
                missing.append(prompt)
        if not missing:
            return
        self._prepare()
        parts = [getattr(self._pipeline, name) for name in self.family.encoders]
        encoders = [encoder for encoder in parts if encoder is not None]
        for encoder in encoders:
            encoder.to(self._device)
        # One by one: batched products are rounded by the shape of the batch.
        for prompt in missing:
            (self._embeddings[prompt],) = split_rows(self.family.embed(self._pipeline, [prompt]))
            self._disk.put(_row_to_tensors(self._embeddings[prompt]), prompt)
        for encoder in encoders:
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of ``prompts`` on the CPU, in order."""
        self.add(prompts)
        return join_rows([self._embeddings[prompt] for prompt in prompts])

    def conditions(self, captions: Sequence[str]) -> Conditions:
        """Embeddings of captions as training reads them, on the CPU: an empty one is what guidance
        leads away from.
        """
        self.add(captions)
        if "" not in captions:
            return self(captions)
        # A dropped caption is embedded as the negative prompt of guidance.
        negative = self.family.negative(self._pipeline, self._embeddings[""])
        return join_rows([self._embeddings[text] if text else negative for text in captions])

    def release(self) -> None:
        """Drop the encoders, of which those of a flow model are as large as the denoiser."""
        for name in self.family.encoders:
            setattr(self._pipeline, name, None)
        gc.collect()  # models refer to themselves
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


LIST_SUFFIX = "[]"
"""Ends the name of a list in a row, as files of tensors have it."""


def _row_to_tensors(row: Conditions) -> dict[str, Tensor]:
    """One row as tensors by name."""
    tensors: dict[str, Tensor] = {}
    for name, values in row.items():
        if isinstance(values, list):
            tensors[name + LIST_SUFFIX] = values[0]
        else:
            tensors[name] = values
    return tensors


def _row_of_tensors(tensors: dict[str, Tensor]) -> Conditions:
    """The reverse."""
    row: Conditions = {}
    for name, values in tensors.items():
        if name.endswith(LIST_SUFFIX):
            row[name.removesuffix(LIST_SUFFIX)] = [values]
        else:
            row[name] = values
    return row
