"""Scorers: models that embed images and texts in one space, where a cosine is a score.

    scorer = load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    i2t = (scorer.images(images) * scorer.texts(prompts)).sum(dim=1)      # raw cosine, CLIP I2T

Names: ``embedded`` (the miniature's own), ``open_clip:MODEL/TAG`` (the tag may be a local
safetensors file), ``open_clip:FOLDER`` and ``hf:ID_OR_FOLDER`` (CLIP of transformers).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from bilora_diffusion.errors import UserError, did_you_mean

from . import open_clip_loading, pretrained
from .names import SCORERS
from .schema import ModelEntry

SCHEMES = ("embedded", "open_clip", "hf")

NOT_THE_PAPERS = "A small model of this package: its scores cannot be set beside the paper's."

T = TypeVar("T")


@runtime_checkable
class Scorer(Protocol):
    """What a score needs of a model.

    Embeddings are (n, d), float32, of unit length and on the CPU. They do not depend on the batch
    size beyond 1e-6.
    """

    @property
    def entry(self) -> ModelEntry:
        """Name and exact revision, to stand beside every score."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of a text that the model sees, with those for start and end."""
        ...

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images of any size and mode, (n, d)."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (n, d); each distinct text is encoded once in a scorer's life."""
        ...

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Lengths in tokens before truncation, with start and end."""
        ...


def load(name: str, *, revision: str | None = None, device: str = "cpu", batch: int = 32) -> Scorer:
    """The scorer called ``name`` (see above).

    Args:
        revision: branch, tag or commit of a hub id after ``hf:``.
        device: of torch, for example "cuda".
        batch: images or texts at a time.

    Raises:
        UserError: an unknown name, or a model that cannot be loaded; it says what to give.
    """
    if batch < 1:
        raise UserError(f"a batch of {batch} holds nothing: give 1 or more.")
    scheme, colon, source = name.partition(":")
    if scheme not in SCHEMES or (scheme == "embedded") == bool(colon):
        hint = "" if scheme in SCHEMES else did_you_mean(scheme, SCHEMES)
        raise UserError(f'scorer "{name}" is unknown{hint}: give {SCORERS}.')
    if scheme == "hf":
        return _from_transformers(source, revision, device, batch)
    if revision is not None:
        raise UserError(
            f'revision "{revision}" has no effect on "{name}": drop it, or give hf:ID, whose'
            " revisions are the hub's."
        )
    if scheme == "embedded":
        return _embedded(device, batch)
    parts = open_clip_loading.load(scheme, source, device)
    label = f"{scheme}:{parts.source}"
    entry = ModelEntry(label, "open_clip", parts.architecture, parts.revision, parts.note)
    return OpenClipScorer(
        parts.model, parts.preprocess, parts.tokenize, entry=entry, device=device, batch=batch
    )


def _from_transformers(source: str, revision: str | None, device: str, batch: int) -> Scorer:
    from transformers import CLIPModel, CLIPProcessor

    parts = pretrained.transformers_parts(
        CLIPModel, CLIPProcessor, "hf", source, revision=revision, device=device
    )
    entry = ModelEntry(f"hf:{parts.source}", "transformers", parts.source, parts.revision)
    return TransformersScorer(parts.model, parts.processor, entry=entry, device=device, batch=batch)


def _embedded(device: str, batch: int) -> Scorer:
    from bilora_diffusion.mini import scorer as mini

    model, preprocess, tokenize = mini.load()
    weights = sorted(mini.scorer_dir().glob("*.safetensors"))
    entry = ModelEntry(
        mini.NAME, "embedded", mini.NAME, pretrained.digest(*weights), NOT_THE_PAPERS
    )
    return OpenClipScorer(
        model.to(device), preprocess, tokenize, entry=entry, device=device, batch=batch
    )


@contextmanager
def _exact() -> Iterator[None]:
    """No gradients, and no TF32 in convolutions (cudnn's default): it would show the batch size."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


class _BatchedScorer(ABC):
    """Batches, unit length and the cache of texts; a subclass embeds one batch."""

    def __init__(self, entry: ModelEntry, context_length: int, device: str, batch: int) -> None:
        self.entry = entry
        self.context_length = context_length
        self._device = device
        self._batch = batch
        self._known: dict[str, Tensor] = {}

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        rows = []
        for part in in_batches(images, self._batch):
            with _exact():
                embeddings = self._embed_images([image.convert("RGB") for image in part])
            rows.append(self._unit(embeddings))
        return torch.cat(rows) if rows else self.texts([""])[:0]

    def texts(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for part in in_batches(new, self._batch):
            with _exact():
                embeddings = self._embed_texts(part)
            self._known.update(zip(part, self._unit(embeddings), strict=True))
        return torch.stack([self._known[text] for text in texts]) if texts else self.texts([""])[:0]

    def tokens(self, texts: Sequence[str]) -> list[int]:
        return [self._length(text) for text in texts]

    def _unit(self, embeddings: Tensor) -> Tensor:
        unit = normalize(embeddings.float(), dim=-1).cpu()
        if not unit.isfinite().all():
            raise UserError(
                f'scorer "{self.entry.name}" gives embeddings that are not finite: its weights are'
                " damaged, give another."
            )
        return unit

    @abstractmethod
    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor: ...

    @abstractmethod
    def _embed_texts(self, texts: Sequence[str]) -> Tensor: ...

    @abstractmethod
    def _length(self, text: str) -> int: ...


class OpenClipScorer(_BatchedScorer):
    """A CLIP, CustomTextCLIP or CoCa of open_clip.

    Args:
        model: float32 and in eval mode, on ``device``.
        preprocess: RGB image -> (3, h, w).
        tokenize: a tokenizer of open_clip.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Callable[[Sequence[str]], Tensor],
        *,
        entry: ModelEntry,
        device: str = "cpu",
        batch: int = 32,
    ) -> None:
        # not every model has the attribute: a text tower of transformers leaves it to the tokenizer
        super().__init__(entry, tokenize([""]).shape[1], device, batch)
        self._model: Any = model
        self._preprocess = preprocess
        self._tokenize = tokenize

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self._preprocess(image) for image in images])
        return self._model.encode_image(pixels.to(self._device))

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._model.encode_text(self._tokenize(list(texts)).to(self._device))

    def _length(self, text: str) -> int:
        return open_clip_loading.token_count(self._tokenize, text)


class TransformersScorer(_BatchedScorer):
    """A ``CLIPModel`` of transformers with its ``CLIPProcessor``."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        entry: ModelEntry,
        device: str = "cpu",
        batch: int = 32,
    ) -> None:
        length = model.config.text_config.max_position_embeddings
        super().__init__(entry, length, device, batch)
        self._model = model
        self._processor = processor

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt")
        return self._model.get_image_features(pixels["pixel_values"].to(self._device)).pooler_output

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._processor.tokenizer(
            list(texts),
            padding="max_length",  # the same for a text whatever stands beside it in the batch
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return self._model.get_text_features(
            tokens["input_ids"].to(self._device), tokens["attention_mask"].to(self._device)
        ).pooler_output

    def _length(self, text: str) -> int:
        return len(self._processor.tokenizer(text, verbose=False)["input_ids"])


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in order, ``size`` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
