"""The distance from generated images to held-out pictures, for ``--choose_by samples``.

    distance = mean over held-out pictures of 1 - cosine(embedding(sample), embedding(picture))

In every run, the sample for a picture's caption starts from the same noise, so runs are paired.
The embeddings come from DINOv2 or from the miniature's scorer. The held-out loss would be cheaper,
but it reaches its minimum long before the samples are best (docs/results.md).
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

ARCHITECTURES = ("dinov2", "dinov2_with_registers")  # supported values of ``model_type``
MAX_PICTURES = 8  # maximum number of held-out pictures to use, evenly spaced in the set
# A function that embeds n RGB images to n vectors, (n, d), without normalizing them.
Embed = Callable[[Sequence[Image]], Tensor]


@dataclass(frozen=True)
class Dinov2:
    """A DINOv2 model, loaded from safetensors by transformers."""

    # Returns the last layer's class token after layer normalization, as in DreamBooth's metric.
    embed: Embed
    model: HubModel


def load_dinov2(name: str, device: str | torch.device = "cpu") -> Dinov2:
    """Load the model ``dinov2:ID_OR_FOLDER``.

    Raises:
        UserError: the name is unknown, or the model is not DINOv2.
        Exception: any error of a library that can't load the model.
    """
    from transformers import AutoImageProcessor, AutoModel

    model = _find_dinov2(name)
    network = load_weights(model, AutoModel, torch.float32).to(device)
    # The image processor resizes, crops and normalizes images as the model expects them.
    processor = load_processor(model, AutoImageProcessor)

    def embed(images: Sequence[Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return network(pixel_values=pixels.to(device)).pooler_output

    return Dinov2(embed, model)


def image_model_bytes(name: str) -> int:
    """Return the size of the ``--image_model`` in bytes, computed from its configuration."""
    from transformers import AutoModel

    if name == EMBEDDED:
        return 0  # only 20 MB, on the CPU
    with _explain_model_errors(name):
        config = _find_dinov2(name).config
    return held_bytes(empty(lambda: AutoModel.from_config(config), torch.float32), "none")


def _find_dinov2(name: str) -> HubModel:
    """Find the model ``dinov2:ID_OR_FOLDER`` and read its configuration."""
    scheme, _, source = name.partition(":")
    if scheme != DINOV2 or not source:
        raise UserError(
            f'image model "{name}" is unknown: give dinov2:ID_OR_FOLDER, such as'
            " dinov2:facebook/dinov2-base."
        )
    model = find_model(source, label=f'"{name}"')
    if model.config.model_type not in ARCHITECTURES:
        raise UserError(
            f'"{name}" is a model of the kind {model.config.model_type}: give a DINOv2 model, such'
            " as dinov2:facebook/dinov2-base."
        )
    return model


def _explain_model_errors(name: str) -> AbstractContextManager[None]:
    """Return a context manager that turns a library's error into a one-sentence `UserError`."""
    fix = f"give {DINOV2}:ID_OR_FOLDER of a model on this machine, or use --choose_by loss"
    return as_user_error(f"--image_model {name} can't be read", fix)


# Cached, so that the runs of --compare share the model.
@lru_cache(maxsize=1)
def image_embedder(name: str, device: torch.device) -> Embed:
    """Load the ``--image_model``: the miniature's scorer for ``embedded``, else DINOv2."""
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
    """The distance from generated images to held-out pictures; each call generates new images.

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
        # Sorted by size, since images of the same size are generated in one batch.
        chosen_samples.sort(key=lambda sample: sample.size)
        self.samples: list[ValidationSample] = []
        pictures: list[Image] = []
        for number, sample in enumerate(chosen_samples):
            height, width = sample.size
            prompt_sample = usual_sample(task.cfg, sample.caption)
            # The seed is not the run's, so that all runs use the same noise.
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
        """Return embeddings of images, of unit length, (n, d), on the CPU."""
        with torch.inference_mode():
            embeddings = self._embed([image.convert("RGB") for image in images])
        return normalize(embeddings.float(), dim=-1).cpu()

    def __call__(self) -> dict[str, float]:
        """Return ``heldout_distance``, the mean, and ``heldout_distance_of/N`` for each picture."""
        images: list[Image] = []
        # Sampling must not change the random numbers that training uses.
        with torch.random.fork_rng():
            for _, batch in itertools.groupby(self.samples, lambda sample: sample.batch_settings):
                images += self.task.sample_images(list(batch))
        distances = 1 - (self.embeddings(images) * self.picture_embeddings).sum(dim=1)  # (n,)
        values = {HELDOUT_DISTANCE: float(distances.mean())}
        for number, distance in enumerate(distances.tolist()):
            values[f"{DISTANCE_BY_PICTURE}{number}"] = distance
        return values
