"""DINOv2, which embeds images by what is in them and knows no text: it tells one dog from another
where CLIP, trained with captions, sees "a dog" in both.

    image_model = load("dinov2:facebook/dinov2-base")
    likeness = (image_model.images(samples) * image_model.images(pictures)).sum(dim=1)  # cosines

Weights are read from safetensors only, by classes of transformers, without code of the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.train.soundness import require_whole

from ..digests import of_files
from .models import ImageEmbedder, ModelEntry, hub_commit
from .names import IMAGE_MODELS

SCHEME = "dinov2"
ARCHITECTURES = ("dinov2", "dinov2_with_registers")
"""``model_type`` of the configurations that are known."""


def load(name: str, device: str = "cpu", batch: int = 32) -> ImageEmbedder:
    """The model called ``dinov2:ID_OR_FOLDER``; an embedding is the class token of the last layer
    after its normalization, as DreamBooth's metric DINO takes it.

    Raises:
        UserError: an unknown name, or a model of another kind; it says what to give.
        Exception: of the library that can't load it.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.utils.hub import cached_file

    scheme, _, source = name.partition(":")
    if scheme != SCHEME or not source:
        raise UserError(f'image model "{name}" is unknown: give {IMAGE_MODELS}.')
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    commit = hub_commit(Path(str(cached_file(place, "config.json"))))
    config = AutoConfig.from_pretrained(place, revision=commit, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f'"{name}" is a model of the kind {config.model_type}: give one of DINOv2, such as'
            " dinov2:facebook/dinov2-base."
        )
    model, report = cast(Any, AutoModel).from_pretrained(
        place,
        revision=commit,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    require_whole(f'"{name}"', report["missing_keys"])
    # The image processor resizes, crops and scales as the model was trained.
    processor: Any = AutoImageProcessor.from_pretrained(
        place, revision=commit or "main", trust_remote_code=False
    )
    if commit is None:
        source, commit = folder.resolve().name, of_files(*sorted(folder.glob("*.safetensors")))
    model.to(device).eval()

    def embed(images: Sequence[Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels.to(device)).pooler_output  # (n, d)

    return ImageEmbedder(ModelEntry(f"{SCHEME}:{source}", SCHEME, source, commit), embed, batch)
