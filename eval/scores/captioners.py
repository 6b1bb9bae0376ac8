"""Captioners: an image in, a sentence out; T2T compares the sentence with the prompt.

    captioner = load("blip:Salesforce/blip-image-captioning-large")
    captions = captioner(images)

Names: ``embedded`` (retrieval: the nearest caption of the miniature's bank), ``blip:ID_OR_FOLDER``
(transformers) and ``coca:MODEL/TAG`` or ``coca:FOLDER`` (open_clip); ``blip`` and ``coca`` alone
mean the defaults below. Nothing is sampled, so an image always gets the same caption.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.errors import UserError, did_you_mean

from . import open_clip_loading, pretrained, scorers
from .names import CAPTIONERS, DEFAULT_CAPTIONERS
from .open_clip_loading import OpenClipParts
from .pretrained import TransformersParts
from .schema import ModelEntry
from .scorers import Scorer, in_batches

MIN_TOKENS = 5
"""Shortest caption, with the start token (open_clip's default; BLIP's authors use the same)."""

MAX_TOKENS = 30
"""Longest caption, with start and end tokens (open_clip's default)."""

BEAMS = 3
"""BLIP's beams, as its authors caption."""


@runtime_checkable
class Captioner(Protocol):
    """What T2T needs: captions that depend on the image alone, not on its batch."""

    @property
    def entry(self) -> ModelEntry:
        """Name and exact revision, to stand beside every score."""
        ...

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption for each image, of any size and mode."""
        ...


def load(
    name: str,
    *,
    scorer: Scorer | None = None,
    device: str = "cpu",
    revision: str | None = None,
    batch: int = 16,
) -> Captioner:
    """The captioner called ``name`` (see above).

    Args:
        scorer: used again for ``embedded`` when it is the embedded one, so that it is loaded once.
        device: of torch, for example "cuda".
        revision: branch, tag or commit of a hub id after ``blip:``.
        batch: images at a time.

    Raises:
        UserError: an unknown name, or a model that cannot be loaded or cannot caption; it says what
            to give.
    """
    if batch < 1:
        raise UserError(f"a batch of {batch} holds nothing: give 1 or more.")
    scheme, colon, source = name.partition(":")
    schemes = ("embedded", *DEFAULT_CAPTIONERS)
    if scheme not in schemes or (scheme == "embedded" and colon):
        hint = "" if scheme in schemes else did_you_mean(scheme, schemes)
        raise UserError(f'captioner "{name}" is unknown{hint}: give {CAPTIONERS}.')
    source = source if colon else DEFAULT_CAPTIONERS.get(scheme, "")
    if scheme == "blip":
        return _blip(source, revision, device, batch)
    if revision is not None:
        raise UserError(f'revision "{revision}" has no effect on "{name}": drop it.')
    if scheme == "coca":
        return _coca(source, device, batch)
    from bilora_diffusion.mini import scorer as mini

    if scorer is None or scorer.entry.kind != "embedded":
        scorer = scorers.load("embedded", device=device, batch=batch)
    return Retrieval(scorer, mini.captions())


class Retrieval:
    """The caption of a bank whose embedding is nearest to the image's.

    Args:
        scorer: gives the space.
        bank: captions; repeated ones count once. The first of several equally near is taken.

    Raises:
        UserError: an empty bank.
    """

    def __init__(self, scorer: Scorer, bank: Sequence[str]) -> None:
        self._bank = list(dict.fromkeys(bank))
        if not self._bank:
            raise UserError("the bank of captions is empty: give one caption or more.")
        self._scorer = scorer
        known = hashlib.sha256("\n".join(self._bank).encode()).hexdigest()[:12]
        scored = scorer.entry
        self.entry = ModelEntry(
            f"{scored.name} retrieval",
            "retrieval",
            scored.model,
            f"captions {known}"
            if scored.revision is None
            else f"{scored.revision}, captions {known}",
            f"Captions are the nearest of {len(self._bank)}, not generated. {scored.note}".strip(),
        )

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        cosine = self._scorer.images(images) @ self._scorer.texts(self._bank).T
        return [self._bank[index] for index in cosine.argmax(dim=1).tolist()]


class _BatchedCaptioner(ABC):
    """Batches; a subclass captions one."""

    def __init__(self, entry: ModelEntry, device: str, batch: int) -> None:
        self.entry = entry
        self._device = device
        self._batch = batch

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        captions: list[str] = []
        for part in in_batches(images, self._batch):
            captions += self._captions([image.convert("RGB") for image in part])
        return captions

    @abstractmethod
    def _captions(self, images: Sequence[Image.Image]) -> list[str]: ...


class Blip(_BatchedCaptioner):
    """BLIP of transformers by beam search: ``BEAMS`` beams, lengths as above, no sampling.

    Args:
        parts: ``BlipForConditionalGeneration``, eval mode, on ``device``, and its processor.
    """

    def __init__(
        self, parts: TransformersParts, entry: ModelEntry, device: str = "cpu", batch: int = 16
    ) -> None:
        from transformers import GenerationConfig

        super().__init__(entry, device, batch)
        self._model, self._processor = parts.model, parts.processor
        # A checkpoint's own generation settings would make captions of two models incomparable.
        self._model.text_decoder.generation_config = GenerationConfig(
            do_sample=False, num_beams=BEAMS, min_length=MIN_TOKENS, max_length=MAX_TOKENS
        )

    def _captions(self, images: Sequence[Image.Image]) -> list[str]:
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt")
        tokens = self._model.generate(pixels["pixel_values"].to(self._device))
        # the first token is the start, which not every BLIP tokenizer knows as special
        decoded = self._processor.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [caption.strip() for caption in decoded]


class Coca(_BatchedCaptioner):
    """CoCa of open_clip by greedy search, see :func:`greedy`.

    Args:
        parts: ``CoCa``, eval mode, on ``device``, and what belongs to it.
    """

    def __init__(
        self, parts: OpenClipParts, entry: ModelEntry, device: str = "cpu", batch: int = 16
    ) -> None:
        super().__init__(entry, device, batch)
        self._model, self._preprocess = parts.model, parts.preprocess
        self._tokenize = tokenize = cast(Any, parts.tokenize)
        hf = getattr(tokenize, "tokenizer", None)  # open_clip's wrapper of a hub tokenizer
        self._start = int(tokenize.sot_token_id if hf is None else hf.bos_token_id)
        self._end = int(tokenize.eot_token_id if hf is None else hf.eos_token_id)

    def _captions(self, images: Sequence[Image.Image]) -> list[str]:
        pixels = torch.stack([self._preprocess(image) for image in images])
        rows = greedy(self._model, pixels.to(self._device), self._start, self._end)
        return [self._decode(row) for row in rows.tolist()]

    def _decode(self, row: list[int]) -> str:
        words = [token for token in row[: row.index(self._end)] if token != self._start]
        decode = getattr(self._tokenize, "tokenizer", self._tokenize).decode
        return decode(words).strip()


@torch.inference_mode()
def greedy(model: Any, pixels: Tensor, start: int, end: int) -> Tensor:
    """CoCa's most probable token after another, as its ``generate`` with ``top_k=1``.

    open_clip 3.3's own ``generate`` does not run beside transformers 5, which has no
    ``BeamSearchScorer`` any more. (Its beam search also ranks beams by sums of logits that are not
    normalized, so it is not rebuilt here.)

    Args:
        model: ``CoCa`` in eval mode.
        pixels: images, (n, 3, h, w).
        start, end: token ids. An end comes at the earliest as token ``MIN_TOKENS`` + 1 and at the
            latest as token ``MAX_TOKENS``.

    Returns:
        Tokens, (n, length): start, words, end, and then ``model.pad_id``.

    Raises:
        UserError: logits that are not finite.
    """
    longest = min(MAX_TOKENS, model.context_length)
    first = model(pixels)
    tokens = torch.full((len(pixels), 1), start, device=pixels.device)
    done = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    while not done.all():
        length = tokens.shape[1]
        logits = model(
            pixels,
            tokens,
            image_latent=first["image_features"],
            image_embs=first["image_embs"],
            output_labels=False,
        )["logits"][:, -1]
        if not logits.isfinite().all():
            raise UserError(
                "the captioner gives logits that are not finite: its weights are damaged, give"
                " another."
            )
        if length < MIN_TOKENS:
            logits[:, end] = -torch.inf
        following = logits.argmax(dim=-1)
        if length + 1 == longest:
            following = torch.full_like(following, end)
        following = following.masked_fill(done, model.pad_id)
        done = done | (following == end)
        tokens = torch.cat((tokens, following[:, None]), dim=1)
    return tokens


def _blip(source: str, revision: str | None, device: str, batch: int) -> Captioner:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    parts = pretrained.transformers_parts(
        BlipForConditionalGeneration,
        BlipProcessor,
        "blip",
        source,
        revision=revision,
        device=device,
    )
    note = f"Beam search with {BEAMS} beams."
    entry = ModelEntry(f"blip:{parts.source}", "blip", parts.source, parts.revision, note)
    return Blip(parts, entry, device, batch)


def _coca(source: str, device: str, batch: int) -> Captioner:
    import open_clip

    parts = open_clip_loading.load("coca", source, device)
    if not isinstance(parts.model, open_clip.CoCa):
        able = ", ".join(m for m in open_clip.list_models() if m.startswith("coca_ViT"))
        raise UserError(
            f'"coca:{source}" is no CoCa and cannot caption: give one of {able} with a tag, or a'
            " folder of one."
        )
    note = f"Greedy search. {parts.note}".strip()
    entry = ModelEntry(f"coca:{parts.source}", "coca", parts.architecture, parts.revision, note)
    return Coca(parts, entry, device, batch)
