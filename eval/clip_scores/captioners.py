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
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.train.soundness import require_whole, require_words

from ..cache import hash_of_files
from . import models
from .models import ModelEntry, Scorer, hub_commit, in_batches
from .settings import BLIP, CAPTIONERS

# Images that are captioned at a time
BATCH = 16
# Length of a caption, with start and end. The shortest length and the beams are those with which
# BLIP's authors caption.
MIN_TOKENS = 5
MAX_TOKENS = 30
BEAMS = 3


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
    """BLIP of transformers by beam search: ``BEAMS`` beams, lengths as above, no sampling.

    Args:
        source: hub id, or a folder with weights in safetensors.
    """
    from transformers import BlipForConditionalGeneration, BlipProcessor, GenerationConfig
    from transformers.utils.hub import cached_file

    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    commit = hub_commit(Path(str(cached_file(place, "config.json"))))
    model, report = cast(Any, BlipForConditionalGeneration).from_pretrained(
        place,
        revision=commit,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    require_whole(f'"blip:{source}"', report["missing_keys"])
    processor: Any = BlipProcessor.from_pretrained(place, revision=commit or "main")
    if commit is None:
        source = folder.resolve().name
        commit = hash_of_files(*sorted(folder.glob("*.safetensors")))
    fix = "put its files beside the weights"
    require_words(f'the tokenizer of "blip:{source}"', processor.tokenizer, None, fix)
    # These replace the checkpoint's settings, since captions of two models must be comparable.
    model.to(device).eval().text_decoder.generation_config = GenerationConfig(
        do_sample=False, num_beams=BEAMS, min_length=MIN_TOKENS, max_length=MAX_TOKENS
    )

    def caption(images: Sequence[Image]) -> list[str]:
        pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixels.to(model.device))  # (n, length)
        # Without the first token, the start: some BLIP tokenizers don't know it as a special one.
        texts = processor.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    note = f"Beam search with {BEAMS} beams."
    return Captioner(ModelEntry(f"blip:{source}", "blip", source, commit, note), caption)
