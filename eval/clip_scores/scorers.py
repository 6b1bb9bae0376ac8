"""Scorers: models that embed images and texts in one space, where a cosine is a score.

    scorer = load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    i2t = (scorer.images(images) * scorer.texts(prompts)).sum(dim=1)      # raw cosine, CLIP I2T

Names: ``embedded`` (the miniature's own), ``open_clip:MODEL/TAG`` (the tag may be a local
safetensors file), ``open_clip:FOLDER`` and ``hf:ID_OR_FOLDER`` (CLIP of transformers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from bilora_diffusion.errors import UserError, did_you_mean

from .models import Loaded, ModelEntry, from_open_clip, from_transformers
from .names import SCORERS

SCHEMES = ("embedded", "open_clip", "hf")
NOT_THE_PAPERS = "A small model of this package: its scores cannot be set beside the paper's."

T = TypeVar("T")


class Scorer:
    """Embeds images and texts: (n, d), float32, of unit length, on the CPU.

    Embeddings do not depend on the batch size beyond 1e-6; each text is encoded once.
    """

    def __init__(
        self,
        entry: ModelEntry,
        embed_images: Callable[[Sequence[Image]], Tensor],
        embed_texts: Callable[[Sequence[str]], Tensor],
        is_cut: Callable[[str], bool],
        batch: int = 32,
    ) -> None:
        self.entry, self.is_cut = entry, is_cut
        self._embed_images, self._embed_texts, self._batch = embed_images, embed_texts, batch
        self._known: dict[str, Tensor] = {}

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeddings of images of any size and mode, (n, d); at least one."""
        parts = in_batches([image.convert("RGB") for image in images], self._batch)
        return torch.cat([self._unit(self._embed_images, part) for part in parts])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (n, d); at least one."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for part in in_batches(new, self._batch):
            self._known.update(zip(part, self._unit(self._embed_texts, part), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def _unit(self, embed: Callable[[Sequence[T]], Tensor], part: Sequence[T]) -> Tensor:
        # TF32 in convolutions is cudnn's default, and would show the batch size.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            unit = normalize(embed(part).float(), dim=-1).cpu()
        if not unit.isfinite().all():
            raise UserError(
                f'scorer "{self.entry.name}" gives embeddings that are not finite: its weights are'
                " damaged, give another."
            )
        return unit


def load(name: str, *, revision: str | None = None, device: str = "cpu", batch: int = 32) -> Scorer:
    """The scorer called ``name`` (see above).

    Raises:
        UserError: an unknown name, or a model that would score wrongly; it says what to give.
        Exception: one of ``models.FAILURES``, of the library that can't load it.
    """
    scheme, colon, source = name.partition(":")
    if scheme not in SCHEMES or (scheme == "embedded") == bool(colon):
        hint = "" if scheme in SCHEMES else did_you_mean(scheme, SCHEMES)
        raise UserError(f'scorer "{name}" is unknown{hint}: give {SCORERS}.')
    if scheme == "hf":
        return _transformers_clip(source, revision, device, batch)
    if revision is not None:
        raise UserError(
            f'revision "{revision}" has no effect on "{name}": drop it, or give hf:ID, whose'
            " revisions are the hub's."
        )
    if scheme == "open_clip":
        return _open_clip(from_open_clip(scheme, source, device), device, batch)
    from bilora_diffusion.mini import scorer as mini

    loaded = from_open_clip(scheme, str(mini.scorer_dir()), device)
    entry = replace(loaded.entry, name=mini.NAME, model=mini.NAME, note=NOT_THE_PAPERS)
    return _open_clip(replace(loaded, entry=entry), device, batch)


def _open_clip(loaded: Loaded, device: str, batch: int) -> Scorer:
    model, preprocess, tokenize = loaded.model, loaded.preprocess, loaded.tokenize
    # The empty text's tokens mark a text's ends and its padding; not every model has the length.
    marks = tokenize([""])[0].tolist()

    def embed_images(images: Sequence[Image]) -> Tensor:
        return model.encode_image(torch.stack([preprocess(i) for i in images]).to(device))

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)).to(device))

    def words(text: str, room: int) -> int:
        row = tokenize([text], context_length=room)[0]
        return sum(token not in marks for token in row.tolist())

    def is_cut(text: str) -> bool:
        return words(text, len(marks)) < words(text, 2 * len(marks))

    return Scorer(loaded.entry, embed_images, embed_texts, is_cut, batch)


def _transformers_clip(source: str, revision: str | None, device: str, batch: int) -> Scorer:
    from transformers import CLIPModel, CLIPProcessor

    loaded = from_transformers(
        "hf", source, CLIPModel, CLIPProcessor, revision=revision, device=device
    )
    model, process, tokenize = loaded.model, loaded.preprocess, loaded.tokenize
    length = model.config.text_config.max_position_embeddings

    def embed_images(images: Sequence[Image]) -> Tensor:
        pixels = process(images=list(images), return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixels.to(device)).pooler_output

    def embed_texts(texts: Sequence[str]) -> Tensor:
        # padded to the full length: the same for a text whatever stands beside it in the batch
        tokens = tokenize(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(device)
        features = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return features.pooler_output

    def is_cut(text: str) -> bool:
        return len(tokenize(text, verbose=False)["input_ids"]) > length

    entry = replace(loaded.entry, kind="transformers")
    return Scorer(entry, embed_images, embed_texts, is_cut, batch)


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in order, ``size`` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
