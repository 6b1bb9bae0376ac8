"""Captioners: an image in, a sentence out; T2T compares the sentence with the prompt.

    captioner = load("blip:Salesforce/blip-image-captioning-large", scorer)
    captions = captioner(images)

Names: ``embedded`` (retrieval: the nearest caption of the miniature's bank), ``blip:ID_OR_FOLDER``
(transformers) and ``coca:MODEL/TAG`` or ``coca:FOLDER`` (open_clip); ``blip`` and ``coca`` alone
mean the defaults below. Nothing is sampled, so an image always gets the same caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from bilora_diffusion.errors import UserError, did_you_mean

from . import models
from .models import Loaded, ModelEntry, Scorer, from_open_clip, from_transformers, in_batches
from .names import CAPTIONERS, DEFAULT_CAPTIONERS

MIN_TOKENS = 5
"""Shortest caption, with the start token (open_clip's default; BLIP's authors use the same)."""

MAX_TOKENS = 30
"""Longest caption, with start and end tokens (open_clip's default)."""

BEAMS = 3
"""BLIP's beams, as its authors caption."""


@dataclass(frozen=True)
class Captioner:
    """Captions that depend on the image alone, not on its batch."""

    entry: ModelEntry
    caption: Callable[[Sequence[Image]], list[str]]
    batch: int = 16

    def __call__(self, images: Sequence[Image]) -> list[str]:
        """One caption for each image, of any size and mode."""
        parts = in_batches([image.convert("RGB") for image in images], self.batch)
        return [caption for part in parts for caption in self.caption(part)]


def load(
    name: str,
    scorer: Scorer | None = None,
    *,
    device: str = "cpu",
    revision: str | None = None,
    batch: int = 16,
) -> Captioner:
    """The captioner called ``name`` (see above).

    Raises:
        UserError: an unknown name, or a model that cannot caption; it says what to give.
        Exception: one of ``models.FAILURES``, of the library that can't load it.
    """
    scheme, colon, source = name.partition(":")
    schemes = ("embedded", *DEFAULT_CAPTIONERS)
    if scheme not in schemes or (scheme == "embedded" and colon):
        hint = "" if scheme in schemes else did_you_mean(scheme, schemes)
        raise UserError(f'captioner "{name}" is unknown{hint}: give {CAPTIONERS}.')
    source = source if colon else DEFAULT_CAPTIONERS.get(scheme, "")
    if scheme == "blip":
        from transformers import BlipForConditionalGeneration, BlipProcessor

        kinds = BlipForConditionalGeneration, BlipProcessor
        loaded = from_transformers("blip", source, *kinds, revision=revision, device=device)
        return blip(loaded, batch)
    if revision is not None:
        raise UserError(f'revision "{revision}" has no effect on "{name}": drop it.')
    if scheme == "coca":
        return coca(from_open_clip("coca", source, device), batch)
    from bilora_diffusion.mini import scorer as mini

    if scorer is None or scorer.entry.kind != "embedded":
        scorer = models.load("embedded", device=device, batch=batch)
    return retrieval(scorer, mini.captions())


def retrieval(scorer: Scorer, bank: Sequence[str]) -> Captioner:
    """The caption of a bank whose embedding is nearest to the image's.

    Args:
        scorer: gives the space.
        bank: captions, at least one; repeated ones count once. The first of several equally near
            is taken.
    """
    known = list(dict.fromkeys(bank))

    def caption(images: Sequence[Image]) -> list[str]:
        cosine = scorer.images(images) @ scorer.texts(known).T
        return [known[index] for index in cosine.argmax(dim=1).tolist()]

    scored, digest = scorer.entry, sha256("\n".join(known).encode()).hexdigest()[:12]
    entry = ModelEntry(
        f"{scored.name} retrieval",
        "retrieval",
        scored.model,
        ", ".join(part for part in (scored.revision, f"captions {digest}") if part),
        f"Captions are the nearest of {len(known)}, not generated. {scored.note}".strip(),
    )
    return Captioner(entry, caption)


def blip(loaded: Loaded, batch: int = 16) -> Captioner:
    """BLIP of transformers by beam search: ``BEAMS`` beams, lengths as above, no sampling."""
    from transformers import GenerationConfig

    model = loaded.model
    # A checkpoint's own generation settings would make captions of two models incomparable.
    model.text_decoder.generation_config = GenerationConfig(
        do_sample=False, num_beams=BEAMS, min_length=MIN_TOKENS, max_length=MAX_TOKENS
    )

    def caption(images: Sequence[Image]) -> list[str]:
        pixels = loaded.preprocess(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixels.to(model.device))
        # the first token is the start, which not every BLIP tokenizer knows as special
        texts = loaded.tokenize.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    entry = replace(loaded.entry, note=f"Beam search with {BEAMS} beams.")
    return Captioner(entry, caption, batch)


def coca(loaded: Loaded, batch: int = 16) -> Captioner:
    """CoCa of open_clip by greedy search, see :func:`greedy`."""
    import open_clip

    model, tokenize = loaded.model, loaded.tokenize
    if not isinstance(model, open_clip.CoCa):
        able = ", ".join(m for m in open_clip.list_models() if m.startswith("coca_ViT"))
        raise UserError(
            f'"{loaded.entry.name}" is no CoCa and cannot caption: give one of {able} with a tag,'
            " or a folder of one."
        )
    hub = getattr(tokenize, "tokenizer", None)  # open_clip's wrapper of a hub tokenizer
    start = int(tokenize.sot_token_id if hub is None else hub.bos_token_id)
    end = int(tokenize.eot_token_id if hub is None else hub.eos_token_id)
    decode = (hub or tokenize).decode

    def caption(images: Sequence[Image]) -> list[str]:
        pixels = torch.stack([loaded.preprocess(image) for image in images])
        rows = greedy(model, pixels.to(model.logit_scale.device), start, end).tolist()
        texts = [[token for token in row[: row.index(end)] if token != start] for row in rows]
        return [decode(text).strip() for text in texts]

    entry = replace(loaded.entry, note=f"Greedy search. {loaded.entry.note}".strip())
    return Captioner(entry, caption, batch)


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
