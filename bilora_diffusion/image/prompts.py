"""Prompt embeddings, by the encoders of whatever kind of model, each computed once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .disk_cache import DiskCache
from .families import of
from .families.base import Conditions, Family, joined, rows


def embed(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """Embed prompts with the pipeline's own text encoders as and where they are now."""
    return of(pipeline).embed(pipeline, prompts)


def embed_negative(pipeline: Any, count: int, prompts: Sequence[str] = ()) -> Conditions:
    """Embeddings of ``count`` negative prompts, empty ones unless given, with the pipeline's own
    text encoders.
    """
    empty = of(pipeline).negative(pipeline, embed(pipeline, [""] * count))
    if not any(prompts):
        return empty
    told = zip(prompts, rows(embed(pipeline, prompts)), rows(empty), strict=True)
    return joined([row if prompt else nothing for prompt, row, nothing in told])


class PromptCache:
    """Embeddings of the prompts that frozen text encoders have seen, computed once each.

    Args:
        pipeline: with its encoders.
        device: where they are moved to for the while of embedding.
        family: the pipeline's kind, with the run's settings; its usual ones by default.
        disk: where embeddings stay for the next run.
        ready: called before the encoders are used.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        family: Family | None = None,
        disk: DiskCache | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._pipeline, self._device = pipeline, device
        self.family = family or of(pipeline)
        self._disk, self._ready = disk or DiskCache(), ready
        self._known: dict[str, Conditions] = {}

    def add(self, prompts: Sequence[str]) -> None:
        """Embed those of ``prompts`` that are new; the encoders visit the device for it only.

        Each on its own, so that the result does not depend on what else was new.
        """
        missing = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._known:
                continue
            if parts := self._disk.get(prompt):
                self._known[prompt] = _row(parts)
            else:
                missing.append(prompt)
        if not missing:
            return
        self._ready()
        parts = [getattr(self._pipeline, name) for name in self.family.encoders]
        encoders = [encoder for encoder in parts if encoder is not None]
        for encoder in encoders:
            encoder.to(self._device)
        for prompt in missing:
            (self._known[prompt],) = rows(self.family.embed(self._pipeline, [prompt]))
            self._disk.put(_parts(self._known[prompt]), prompt)
        for encoder in encoders:
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of ``prompts`` on the CPU, in order."""
        self.add(prompts)
        return joined([self._known[prompt] for prompt in prompts])

    def conditions(self, captions: Sequence[str]) -> Conditions:
        """Embeddings of captions as training reads them, on the CPU: an empty one is what guidance
        leads away from.
        """
        self.add(captions)
        if "" not in captions:
            return self(captions)
        negative = self.family.negative(self._pipeline, self._known[""])
        return joined([self._known[text] if text else negative for text in captions])

    def release(self) -> None:
        """Let go of the encoders, of which those of a flow model are as large as the denoiser."""
        for name in self.family.encoders:
            setattr(self._pipeline, name, None)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


LISTED = "[]"
"""Ends the name of what is a list in a row."""


def _parts(row: Conditions) -> dict[str, Tensor]:
    """One row as tensors by name."""
    lists = {name: values for name, values in row.items() if isinstance(values, list)}
    return {
        **{name: values for name, values in row.items() if name not in lists},
        **{f"{name}{LISTED}": values[0] for name, values in lists.items()},
    }


def _row(parts: dict[str, Tensor]) -> Conditions:
    """The reverse."""
    return {
        name.removesuffix(LISTED): [values] if name.endswith(LISTED) else values
        for name, values in parts.items()
    }
