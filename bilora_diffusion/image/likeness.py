"""The distance of sampled images to held-out pictures, the measure of `--choose_by samples`.

    distance = mean over held-out pictures of 1 - cosine(embedding(sample), embedding(picture))

Each picture's caption is sampled with the same noise in every run, so that runs are paired. The
embeddings are those of DINOv2, or of the miniature's scorer. The held-out loss would be cheaper,
but is lowest long before samples are best (docs/results.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters.quantize import held_bytes
from ..core.errors import UserError, as_user_error
from ..core.values import DINOV2, DISTANCE_BY_PICTURE, EMBEDDED, HELDOUT_DISTANCE
from ..train.dry_run import empty
from .hub_models import HubModel, find_model, load_processor, load_weights
from .sets import ImageSet
from .stream import centered_samples
from .validation import ValidationSample, usual_sample

ARCHITECTURES = ("dinov2", "dinov2_with_registers")  # ``model_type`` of known configurations
MAX_PICTURES = 8  # number of held-out pictures whose captions are sampled, evenly spaced
# Embeds n RGB images: (n, d), not normalized.
Embed = Callable[[Sequence[Image]], Tensor]


@dataclass(frozen=True)
class Dinov2:
    """DINOv2, loaded from safetensors with transformers."""

    # The class token of the last layer after its normalization, as in DreamBooth's metric DINO.
    embed: Embed
    model: HubModel


def load_dinov2(name: str, device: str | torch.device = "cpu") -> Dinov2:
    """Load the model ``dinov2:ID_OR_FOLDER``.

    Raises:
        UserError: an unknown name, or a model of another kind.
        Exception: any error of a library that can't load it.
    """
    from transformers import AutoImageProcessor, AutoModel

    model = _find_dinov2(name)
    network = load_weights(model, AutoModel, torch.float32).to(device)
    # The image processor resizes, crops and scales images as in the model's training.
    processor = load_processor(model, AutoImageProcessor)

    def embed(images: Sequence[Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return network(pixel_values=pixels.to(device)).pooler_output

    return Dinov2(embed, model)


def image_model_bytes(name: str) -> int:
    """Bytes of the model of ``--image_model``, from its configuration."""
    from transformers import AutoModel

    if name == EMBEDDED:
        return 0  # 11 MB on the CPU
    with _explain_model_errors(name):
        config = _find_dinov2(name).config
    return held_bytes(empty(lambda: AutoModel.from_config(config), torch.float32), "none")


def _find_dinov2(name: str) -> HubModel:
    """The model ``dinov2:ID_OR_FOLDER``."""
    scheme, _, source = name.partition(":")
    if scheme != DINOV2 or not source:
        raise UserError(
            f'image model "{name}" is unknown: give dinov2:ID_OR_FOLDER, such as'
            " dinov2:facebook/dinov2-base."
        )
    model = find_model(source, label=f'"{name}"')
    if model.config.model_type not in ARCHITECTURES:
        raise UserError(
            f'"{name}" is a model of the kind {model.config.model_type}: give one of DINOv2, such'
            " as dinov2:facebook/dinov2-base."
        )
    return model


def _explain_model_errors(name: str) -> AbstractContextManager[None]:
    """Context manager: turns a library's error into one sentence."""
    fix = f"give {DINOV2}:ID_OR_FOLDER of a model that is here, or --choose_by loss"
    return as_user_error(f"--image_model {name} can't be read", fix)


# Cached, so that the runs of --compare share the model.
@lru_cache(maxsize=1)
def image_embedder(name: str, device: torch.device) -> Embed:
    """Load the image model of ``--image_model``: ``embedded``, or one of `load_dinov2`."""
    if name != EMBEDDED:
        with _explain_model_errors(name):
            return load_dinov2(name, device).embed
    from ..mini import scorer

    model, preprocess, _ = scorer.load()
    clip: Any = model

    def embed(images: Sequence[Image]) -> Tensor:
        return clip.encode_image(torch.stack([preprocess(image) for image in images]))

    return embed


class SampledDistance:
    """Measures the distance of samples to held-out pictures.

    Args:
        task: a `DreamBooth`.
        validation: held-out images.
    """

    def __init__(self, task: Any, validation: ImageSet) -> None:
        self.task = task
        self._embed = image_embedder(task.cfg.image_model, task.device)
        all_samples = list(centered_samples(validation, task.cfg))
        count = min(len(all_samples), MAX_PICTURES)
        chosen_samples = [all_samples[i * len(all_samples) // count] for i in range(count)]
        # Sorted by size, since images of one size are sampled together.
        chosen_samples.sort(key=lambda sample: sample.size)
        self.samples: list[ValidationSample] = []
        pictures: list[Image] = []
        for number, sample in enumerate(chosen_samples):
            height, width = sample.size
            prompt_sample = usual_sample(task.cfg, sample.caption)
            # Not with the run's seed, so that all runs use the same noise.
            prompt_sample = replace(
                prompt_sample,
                seed=number,
                height=height,
                width=width,
                guidance_from=task.cfg.choice_guidance_from,
            )
            self.samples.append(prompt_sample)
            pictures.append(validation.image(sample.index))
        self.picture_embeddings = self.embeddings(pictures)  # (n, d)

    def embeddings(self, images: Sequence[Image]) -> Tensor:
        """Embed images to vectors of unit length, (n, d), on the CPU."""
        with torch.inference_mode():
            embeddings = self._embed([image.convert("RGB") for image in images])
        return normalize(embeddings.float(), dim=-1).cpu()

    def __call__(self) -> dict[str, float]:
        """``heldout_distance``, and ``heldout_distance_of/N`` of each picture."""
        images: list[Image] = []
        # Sampling must not change the random numbers of training.
        with torch.random.fork_rng():
            for _, batch in itertools.groupby(self.samples, lambda sample: sample.batch_settings):
                images += self.task.sample_images(list(batch))
        distances = 1 - (self.embeddings(images) * self.picture_embeddings).sum(dim=1)  # (n,)
        values = {HELDOUT_DISTANCE: float(distances.mean())}
        for number, distance in enumerate(distances.tolist()):
            values[f"{DISTANCE_BY_PICTURE}{number}"] = distance
        return values
