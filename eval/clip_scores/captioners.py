"""Captioners, which write a caption for an image; T2T compares the caption with the prompt.

    captioner = load("blip:Salesforce/blip-image-captioning-large", scorer)
    captions = captioner(images)

Names: ``embedded`` (retrieves the nearest of the miniature's captions), ``blip:ID_OR_FOLDER``
(loads a model with transformers), and ``blip`` (short for the large BLIP model). Decoding is
deterministic, so an image always gets the same caption.
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

# Images captioned in one batch
BATCH = 16


@dataclass(frozen=True)
class Captioner:
    """A captioning model; a caption depends only on its image, not on the rest of the batch."""

    entry: ModelEntry
    caption: Callable[[Sequence[Image]], list[str]]

    def __call__(self, images: Sequence[Image]) -> list[str]:
        """Write one caption for each image; the images may have any size and mode."""
        captions: list[str] = []
        for part in in_batches([image.convert("RGB") for image in images], BATCH):
            captions += self.caption(part)
        return captions


def load(name: str, scorer: Scorer | None = None, device: str = "cpu") -> Captioner:
    """Load the captioner called ``name``; the module docstring lists the names.

    Args:
        name: name of the captioner.
        scorer: for "embedded", a scorer to use if it is the embedded one; otherwise, the embedded
            scorer is loaded.
        device: device of the model.

    Raises:
        UserError: the name is unknown, or the model is not a BLIP captioner that can be used; the
            message names a fix.
        Exception: any error of the library that loads the model.
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
    """Make a captioner that returns the caption whose embedding is nearest to the image's.

    Args:
        scorer: embeds images and captions.
        bank: one or more captions; duplicates count once. A tie goes to the first caption.
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
    note = (
        f"Captions are retrieved, not generated: each is the nearest of {len(captions)} captions."
        f" {scorer_entry.note}"
    )
    name = f"{scorer_entry.name} retrieval"
    entry = ModelEntry(name, "retrieval", scorer_entry.model, revision, note.strip())
    return Captioner(entry, caption)


def blip(source: str, device: str = "cpu") -> Captioner:
    """Load a BLIP captioner that uses beam search (see `bilora_diffusion.image.caption_models`).

    Args:
        source: hub id, or a folder with weights in safetensors.
        device: device of the model.
    """
    name = f"blip:{source}"
    captioner = load_captioner(source, label=f'"{name}"', device=device)
    if captioner.kind != caption_models.BLIP:
        raise UserError(f'"{name}" is a {captioner.kind} model: give a BLIP model.')
    note = f"Beam search with {caption_models.BEAMS} beams."
    return Captioner(hub_entry("blip", captioner.model, note), captioner.captions)
