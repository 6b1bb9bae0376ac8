"""Models that embed images: scorers, which embed texts in the same space, and DINOv2.

    scorer = load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    i2t = (scorer.images(images) * scorer.texts(prompts)).sum(dim=1)      # raw cosine, CLIP I2T

    image_model = dinov2("dinov2:facebook/dinov2-base")
    likeness = (image_model.images(samples) * image_model.images(pictures)).sum(dim=1)  # cosines

Scorers are ``embedded`` (the miniature's own), ``open_clip:MODEL/TAG`` and ``open_clip:FOLDER``;
open_clip loads all of them. DINOv2 is loaded by transformers, without remote code. It does not
embed texts, but it distinguishes two dogs better than CLIP, which was trained on captions and sees
"a dog" in both.

Errors of the libraries pass through, and the command translates them. The libraries silently accept
pickles and a tokenizer without a vocabulary; this module refuses both. Weights are read from
safetensors. The only exception is an open_clip tag without a safetensors file: open_clip then reads
a pickle with torch's ``weights_only``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.values import DINOV2
from bilora_diffusion.image.hub_models import HubModel
from bilora_diffusion.image.likeness import load_dinov2
from bilora_diffusion.train.soundness import require_words

from ..cache import hash_of_files
from .settings import SCORERS

# File names that open_clip uses for weights in safetensors
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
# Possible parts of a scorer's name before the colon
SCHEMES = ("embedded", "open_clip")
NOT_THE_PAPERS = "A small model of this package: its scores cannot be compared with the paper's."

T = TypeVar("T")


@dataclass(frozen=True)
class ModelEntry:
    """A scorer, a captioner or an image model, as it is recorded in a result."""

    # Name shown with every score
    name: str
    # "open_clip", "embedded", "blip", "retrieval" or "dinov2"
    kind: str
    # Architecture, hub id, folder name, or name of the embedded model
    model: str
    # Pretrained tag, and commit or hash of the weights; for retrieval, also the captions' hash
    revision: str | None = None
    # Sentence shown with the scores; "" for none
    note: str = ""


def _find_pretrained(scheme: str, architecture: str, tag: str) -> tuple[ModelEntry, dict[str, Any]]:
    """Find a model in open_clip's list.

    Returns:
        The model's entry, and the options for open_clip's function that creates it.
    """
    import open_clip

    if not open_clip.is_pretrained_cfg(architecture, tag):
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f'open_clip\'s {architecture} has no tag "{tag}"{did_you_mean(tag, tags)}: give one of'
            f" {', '.join(tags)}, or a folder."
        )
    config = open_clip.get_pretrained_cfg(architecture, tag)
    # Weights trained with QuickGELU give wrong embeddings in a model without it, and open_clip only
    # prints a warning. This affects all of OpenAI's weights under plain architecture names.
    has_quick_gelu = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
    force_quick_gelu = bool(config.get("quick_gelu")) and not has_quick_gelu
    note = "QuickGELU is on, because the weights were trained with it." if force_quick_gelu else ""
    file = Path(open_clip.download_pretrained(config))
    revision = f"{tag}@{hub_commit(file) or hash_of_files(file)}"
    entry = ModelEntry(f"{scheme}:{architecture}/{tag}", scheme, architecture, revision, note)
    return entry, {"pretrained": tag, "force_quick_gelu": force_quick_gelu}


def _find_saved(scheme: str, source: str) -> ModelEntry:
    """Find a model in a folder saved by open_clip.

    A folder without safetensors is refused, because open_clip would load a pickle from it.
    """
    import open_clip

    folder = Path(source).expanduser()
    files = [folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f'"{source}" is not an open_clip model{did_you_mean(source, open_clip.list_models())}'
            f" and not a folder with {OPEN_CLIP_FILES[0]} (a pickle can run code): give MODEL/TAG"
            " from open_clip.list_pretrained(), or such a folder."
        )
    name = folder.resolve().name
    return ModelEntry(f"{scheme}:{name}", scheme, name, hash_of_files(files[0]))


def hub_commit(file: Path) -> str | None:
    """Return the commit of a file in the hub's cache; None for any other file."""
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(str(file), None)


class ImageEmbedder:
    """A model that embeds images; embeddings are (n, d), float32, of unit length, on the CPU.

    The batch size changes an embedding by less than 1e-6.

    Args:
        entry: description of the model for a result.
        embed: function from RGB images to embeddings, (n, d), of any norm and dtype.
        batch: number of images per call of ``embed``.
    """

    def __init__(
        self, entry: ModelEntry, embed: Callable[[Sequence[Image]], Tensor], batch: int = 32
    ) -> None:
        self.entry = entry
        self._embed_images = embed
        self._batch = batch

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embed one or more images of any size and mode, (n, d)."""
        parts = in_batches([image.convert("RGB") for image in images], self._batch)
        return torch.cat([self._unit(self._embed_images, part) for part in parts])

    def _unit(self, embed: Callable[[Sequence[T]], Tensor], part: Sequence[T]) -> Tensor:
        """Embed a batch, and scale the embeddings to unit length."""
        # cuDNN uses TF32 in convolutions by default; embeddings would then depend on the batch.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            unit = normalize(embed(part).float(), dim=-1).cpu()
        if not unit.isfinite().all():
            raise UserError(
                f'model "{self.entry.name}" gives embeddings that are not finite, so its weights'
                " are damaged: give another model."
            )
        return unit


class Scorer(ImageEmbedder):
    """A model that embeds images and texts in one space; each text is encoded once.

    Args:
        entry: description of the model for a result.
        embed_images: see `ImageEmbedder`.
        embed_texts: function from texts to embeddings, (n, d), of any norm and dtype.
        is_cut: function that returns whether a text is longer than the text encoder's limit.
        batch: number of images or texts per call.
    """

    def __init__(
        self,
        entry: ModelEntry,
        embed_images: Callable[[Sequence[Image]], Tensor],
        embed_texts: Callable[[Sequence[str]], Tensor],
        is_cut: Callable[[str], bool],
        batch: int = 32,
    ) -> None:
        super().__init__(entry, embed_images, batch)
        self.is_cut = is_cut
        self._embed_texts = embed_texts
        self._text_embeddings: dict[str, Tensor] = {}

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed one or more texts, (n, d)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._text_embeddings]
        for part in in_batches(new, self._batch):
            embeddings = self._unit(self._embed_texts, part)
            self._text_embeddings.update(zip(part, embeddings, strict=True))
        return torch.stack([self._text_embeddings[text] for text in texts])


def load(name: str, device: str = "cpu", batch: int = 32) -> Scorer:
    """Load the scorer called ``name``; the module docstring lists the names.

    Raises:
        UserError: the name is unknown, or the model would give wrong scores; the message names a
            fix.
        Exception: any error of the library that loads the model.
    """
    scheme, colon, source = name.partition(":")
    if scheme not in SCHEMES or (scheme == "embedded") == bool(colon):
        hint = "" if scheme in SCHEMES else did_you_mean(scheme, SCHEMES)
        raise UserError(f'scorer "{name}" is unknown{hint}: give {SCORERS}.')
    if scheme == "open_clip":
        return _open_clip(scheme, source, device, batch)
    from bilora_diffusion.mini import scorer as mini

    scorer = _open_clip(scheme, str(mini.scorer_dir()), device, batch)
    scorer.entry = replace(scorer.entry, name=mini.NAME, model=mini.NAME, note=NOT_THE_PAPERS)
    return scorer


def _open_clip(scheme: str, source: str, device: str, batch: int) -> Scorer:
    """Load a CLIP or CustomTextCLIP model with open_clip.

    Args:
        scheme: part of the scorer's name before the colon.
        source: "MODEL/TAG", or a folder saved by open_clip.
        device: device of the model.
        batch: number of images or texts per call.
    """
    import open_clip

    architecture, _, tag = source.partition("/")
    if architecture in open_clip.list_models():
        place = architecture
        entry, options = _find_pretrained(scheme, architecture, tag)
    else:
        place = f"local-dir:{Path(source).expanduser()}"
        options = {}
        entry = _find_saved(scheme, source)
    model_and_transform: Any = open_clip.create_model_from_pretrained(
        place, device=device, **options
    )
    model, preprocess = model_and_transform
    model.eval()
    tokenize: Any = open_clip.get_tokenizer(place)
    if inner := getattr(tokenize, "tokenizer", None):
        fix = "put its files next to the weights"
        require_words(f'the tokenizer of "{entry.name}"', inner, None, fix)
    # The tokens of an empty text: the start and end tokens, and padding to the context length
    empty_tokens = tokenize([""])[0].tolist()

    def embed_images(images: Sequence[Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images])  # (n, 3, h, w)
        return model.encode_image(pixels.to(device))

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)).to(device))

    def is_cut(text: str) -> bool:
        # Not every tokenizer reports a text's length. A text was cut if twice the context length
        # gives it more tokens.
        counts = []
        for context_length in (len(empty_tokens), 2 * len(empty_tokens)):
            tokens = tokenize([text], context_length=context_length)[0].tolist()
            counts.append(sum(token not in empty_tokens for token in tokens))
        return counts[0] < counts[1]

    return Scorer(entry, embed_images, embed_texts, is_cut, batch)


def dinov2(name: str, device: str = "cpu", batch: int = 32) -> ImageEmbedder:
    """Load the model called ``dinov2:ID_OR_FOLDER``; see `load_dinov2`."""
    dino = load_dinov2(name, device)
    return ImageEmbedder(hub_entry(DINOV2, dino.model), dino.embed, batch)


def hub_entry(kind: str, model: HubModel, note: str = "") -> ModelEntry:
    """Make the entry of a transformers model."""
    # A folder has no commit, so the hash of its weights identifies the model.
    revision = model.commit or hash_of_files(*model.weight_files)
    return ModelEntry(f"{kind}:{model.source}", kind, model.source, revision, note)


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield ``items`` in order, ``size`` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
