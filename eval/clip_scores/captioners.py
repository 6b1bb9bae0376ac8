"""Captioners: an image in, a sentence out; T2T compares the sentence with the prompt.

    captioner = load("blip:Salesforce/blip-image-captioning-large", scorer)
    captions = captioner(images)

Names: ``embedded`` (retrieval: the nearest caption of the miniature's bank), ``blip:ID_OR_FOLDER``
(transformers); ``blip`` alone means the large one. Nothing is sampled, so an image always gets the
same caption.
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

from ..cache import of_files
from . import models
from .models import ModelEntry, Scorer, hub_commit, in_batches
from .settings import BLIP, CAPTIONERS

BATCH = 16
MIN_TOKENS = 5
MAX_TOKENS = 30
"""Lengths of a caption, with start and end."""
BEAMS = 3
"""As BLIP's authors caption, who also use the shortest length."""


@dataclass(frozen=True)
class Captioner:
    """Captions that depend on the image alone, not on its batch."""

    entry: ModelEntry
    caption: Callable[[Sequence[Image]], list[str]]

    def __call__(self, images: Sequence[Image]) -> list[str]:
        """One caption for each image, of any size and mode."""
        parts = in_batches([image.convert("RGB") for image in images], BATCH)
        return [caption for part in parts for caption in self.caption(part)]


def load(name: str, scorer: Scorer | None = None, device: str = "cpu") -> Captioner:
    """The captioner called ``name`` (see above).

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
    """The caption of a bank whose embedding is nearest to the image's.

    Args:
        scorer: gives the space.
        bank: captions, at least one; repeated ones count once. The first of several equally near
            is taken.
    """
    captions = list(dict.fromkeys(bank))

    def caption(images: Sequence[Image]) -> list[str]:
        cosines = scorer.images(images) @ scorer.texts(captions).T  # (images, captions)
        return [captions[index] for index in cosines.argmax(dim=1).tolist()]

    scored, digest = scorer.entry, sha256("\n".join(captions).encode()).hexdigest()[:12]
    entry = ModelEntry(
        f"{scored.name} retrieval",
        "retrieval",
        scored.model,
        ", ".join(part for part in (scored.revision, f"captions {digest}") if part),
        f"Captions are the nearest of {len(captions)}, not generated. {scored.note}".strip(),
    )
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
        source, commit = folder.resolve().name, of_files(*sorted(folder.glob("*.safetensors")))
    fix = "put its files beside the weights"
    require_words(f'the tokenizer of "blip:{source}"', processor.tokenizer, None, fix)
    # A checkpoint's own generation settings would make captions of two models incomparable.
    model.to(device).eval().text_decoder.generation_config = GenerationConfig(
        do_sample=False, num_beams=BEAMS, min_length=MIN_TOKENS, max_length=MAX_TOKENS
    )

    def caption(images: Sequence[Image]) -> list[str]:
        pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixels.to(model.device))
        # the first token is the start, which not every BLIP tokenizer knows as special
        texts = processor.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    note = f"Beam search with {BEAMS} beams."
    return Captioner(ModelEntry(f"blip:{source}", "blip", source, commit, note), caption)
