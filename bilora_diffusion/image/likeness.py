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
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters.quantize import held_bytes
from ..core.errors import UserError, as_user_error
from ..core.values import DINOV2, DISTANCE_BY_PICTURE, EMBEDDED, HELDOUT_DISTANCE
from ..train.dry_run import empty
from ..train.soundness import require_whole
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
    source: str  # hub id, or the folder's name
    commit: str | None  # commit on the hub; None for a folder
    folder: Path  # place of a folder's files


def load_dinov2(name: str, device: str | torch.device = "cpu") -> Dinov2:
    """Load the model ``dinov2:ID_OR_FOLDER``.

    Raises:
        UserError: an unknown name, or a model of another kind.
        Exception: any error of a library that can't load it.
    """
    from transformers import AutoImageProcessor, AutoModel

    place, commit, _ = _read_config(name)
    model, report = cast(Any, AutoModel).from_pretrained(
        place,
        revision=commit,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    require_whole(f'"{name}"', report["missing_keys"])
    # The image processor resizes, crops and scales images as in the model's training.
    processor: Any = AutoImageProcessor.from_pretrained(
        place, revision=commit or "main", trust_remote_code=False
    )
    model.to(device).eval()

    def embed(images: Sequence[Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels.to(device)).pooler_output

    folder = Path(place)
    source = place
    if commit is None:
        source = folder.resolve().name
    return Dinov2(embed, source, commit, folder)


def image_model_bytes(name: str) -> int:
    """Bytes of the model of ``--image_model``, from its configuration."""
    from transformers import AutoModel

    if name == EMBEDDED:
        return 0  # 11 MB on the CPU
    with _explain_model_errors(name):
        config = _read_config(name)[2]
    return held_bytes(empty(lambda: AutoModel.from_config(config), torch.float32), "none")


def _read_config(name: str) -> tuple[str, str | None, Any]:
    """Path or id, commit and configuration of ``dinov2:ID_OR_FOLDER``; a folder has no commit."""
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file, extract_commit_hash

    scheme, _, source = name.partition(":")
    if scheme != DINOV2 or not source:
        raise UserError(
            f'image model "{name}" is unknown: give dinov2:ID_OR_FOLDER, such as'
            " dinov2:facebook/dinov2-base."
        )
    folder = Path(source).expanduser()
    place = source
    if folder.is_dir():
        place = str(folder)
    commit = extract_commit_hash(str(cached_file(place, "config.json")), None)
    config = AutoConfig.from_pretrained(place, revision=commit, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f'"{name}" is a model of the kind {config.model_type}: give one of DINOv2, such as'
            " dinov2:facebook/dinov2-base."
        )
    return place, commit, config


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
            prompt_sample = replace(prompt_sample, seed=number, height=height, width=width)
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
