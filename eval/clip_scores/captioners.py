"""Captioners, which write a sentence for an image; T2T compares it with the prompt.

    captioner = load("blip:Salesforce/blip-image-captioning-large", scorer)
    captions = captioner(images)

Names: ``embedded`` (the nearest caption of the miniature's bank), ``blip:ID_OR_FOLDER``
(transformers), and ``blip`` for the large one. Nothing is sampled, so an image always gets the same
caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from PIL.Image import Image

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.image import caption_models
from bilora_diffusion.image.caption_models import load_captioner

from . import models
from .models import ModelEntry, Scorer, hub_entry, in_batches
from .settings import BLIP, CAPTIONERS

# Images that are captioned at a time
BATCH = 16


@dataclass(frozen=True)
class Captioner:
    """Writes captions that depend on the image only, not on its batch."""

    entry: ModelEntry
    caption: Callable[[Sequence[Image]], list[str]]

    def __call__(self, images: Sequence[Image]) -> list[str]:
        """One caption for each image, of any size and mode."""
        captions: list[str] = []
        for part in in_batches([image.convert("RGB") for image in images], BATCH):
            captions += self.caption(part)
        return captions


def load(name: str, scorer: Scorer | None = None, device: str = "cpu") -> Captioner:
    """The captioner called ``name``, see the top of this file.

    Raises:
        UserError: an unknown name, or a model that cannot caption; it says what to give.
        Exception: of the library that can't load it.
    """
    scheme, colon, source = name.partition(":")
    if scheme == "blip":
        return blip(source if colon else BLIP, device)
    if name != "embedded":
        hint = did_you_mean(scheme, ("embedded", "blip"))
        raise UserError(f'captioner "{name}" is unknown{hint}: give {CAPTIONERS}.')
    from bilora_diffusion.mini import scorer as mini

    if scorer is None or scorer.entry.kind != "embedded":
        scorer = models.load("embedded", device)
    return retrieval(scorer, mini.captions())


def retrieval(scorer: Scorer, bank: Sequence[str]) -> Captioner:
    """A captioner that takes the caption of a bank whose embedding is nearest to the image's.

    Args:
        scorer: embeds images and captions.
        bank: captions, at least one; repeated ones count once. Of equally near captions the first
            is taken.
    """
    captions = list(dict.fromkeys(bank))

    def caption(images: Sequence[Image]) -> list[str]:
        cosines = scorer.images(images) @ scorer.texts(captions).T  # (images, captions)
        return [captions[index] for index in cosines.argmax(dim=1).tolist()]

    scorer_entry = scorer.entry
    digest = sha256("\n".join(captions).encode()).hexdigest()[:12]
    revision = f"captions {digest}"
    if scorer_entry.revision:
        revision = f"{scorer_entry.revision}, {revision}"
    note = f"Captions are the nearest of {len(captions)}, not generated. {scorer_entry.note}"
    name = f"{scorer_entry.name} retrieval"
    entry = ModelEntry(name, "retrieval", scorer_entry.model, revision, note.strip())
    return Captioner(entry, caption)


def blip(source: str, device: str = "cpu") -> Captioner:
    """BLIP of transformers by beam search (`bilora_diffusion.image.caption_models`).

    Args:
        source: hub id, or a folder with weights in safetensors.
    """
    name = f"blip:{source}"
    captioner = load_captioner(source, label=f'"{name}"', device=device)
    if captioner.kind != caption_models.BLIP:
        raise UserError(f'"{name}" is a model of the kind {captioner.kind}: give one of BLIP.')
    note = f"Beam search with {caption_models.BEAMS} beams."
    return Captioner(hub_entry("blip", captioner.model, note), captioner.captions)
