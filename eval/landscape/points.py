"""Points of the landscape: a subject with its run configuration and images, and the loaded model.

All points of a result must have the same loss as a function of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.core import removed
from bilora_diffusion.core.errors import UserError, as_user_error
from bilora_diffusion.core.values import NOISE_LEVELS, TRAINING_GRID_LOSS
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.image.loss import GridLoss
from bilora_diffusion.image.pipeline import load_pipeline, resolve
from bilora_diffusion.image.script import training_images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.run.record import RUN

from ..load import put_lora, put_models
from ..subjects import BASE, Subject
from .surface import Weight

# Options that affect the loss as a function of the weights, except base model and images
LOSS_OPTIONS = (
    "resolution",
    "aspect_ratio_buckets",
    "concepts",
    "instance_prompt",
    "trigger_word",
    "unmasked_weight",
    "image_interpolation_mode",
    "do_edm_style_training",
    "snr_gamma",
    "snr_weighting",
    "weighting_scheme",
    "precondition_outputs",
    "timestep_shift",
    "train_text_encoder",
)
# Options that define the training images of a run
SET_OPTIONS = (
    "concepts",
    "dataset_name",
    "dataset_config_name",
    "instance_data_dir",
    "image_column",
    "caption_column",
    "mask_column",
    "alpha_mask",
    "skip_bad_images",
)


@dataclass(frozen=True)
class Point:
    """One point of the landscape."""

    subject: Subject
    # Configuration of the run; for the base model, the configuration of the first run
    config: DreamBoothConfig
    # Images of the loss
    images: ImageSet

    @property
    def loss(self) -> dict[str, Any]:
        """Facts that define the loss as a function of the weights."""
        facts = {"base model": base_key(self.config), "images": self.images.fingerprint()}
        return facts | {f"--{name}": getattr(self.config, name) for name in LOSS_OPTIONS}


def open_points(subjects: Sequence[Subject]) -> dict[str, Point]:
    """Return a point for each subject, by label; the base model gets the first run's images.

    Raises:
        UserError: there are no runs, a subject is neither a usable image run nor the base model, or
            the losses of the points can't be compared.
    """
    configs = {subject.label: _config(subject) for subject in subjects if subject.kind != BASE}
    if not configs:
        raise UserError("the base model alone has no training images: name the folder of a run.")
    first_config = next(iter(configs.values()))
    sets: dict[tuple[str, ...], ImageSet] = {}  # by `SET_OPTIONS`, so that runs share images
    points = {}
    for subject in subjects:
        config = configs.get(subject.label, first_config)
        key = tuple(repr(getattr(config, name)) for name in SET_OPTIONS)
        if key not in sets:
            sets[key] = training_images(config)
        points[subject.label] = Point(subject, config, sets[key])
    _require_comparable(points)
    return points


def has_factors(subject: Subject) -> bool:
    """Return whether a subject has an adapter, and so a LoRA space."""
    return subject.kind != BASE and not subject.is_whole_model


def base_key(config: DreamBoothConfig) -> list[Any]:
    """Return facts that identify a base model: its name, revision, variant, VAE and local files."""
    folder = Path(resolve(config.pretrained_model_name_or_path))
    files = []
    if folder.is_dir():
        for file in sorted(folder.glob("**/*.safetensors")):
            stat = file.stat()
            files.append([str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns])
    vae = config.pretrained_vae_model_name_or_path
    return [str(folder), config.revision, config.variant, vae, files]


def _config(subject: Subject) -> DreamBoothConfig:
    """Return the configuration of an image run.

    Raises:
        UserError: the subject is not an image run, its record is damaged or has an option that this
            version does not know, or its weights contain an auxiliary adapter.
    """
    folder = subject.folder
    values = subject.record.get("config", {})
    if values.get("pretrained_model_name_or_path") is None:
        raise UserError(f"{subject.source} is not a run on images: name another run.")
    # The loss does not depend on the training, so training options that later versions removed can
    # be left out.
    values = {name: value for name, value in values.items() if name not in removed.OPTIONS}
    unknown_options = sorted(values.keys() - {field.name for field in fields(DreamBoothConfig)})
    if unknown_options:
        raise UserError(
            f"{folder} was trained with the option {unknown_options[0]}, which this version does"
            " not know: use the version that trained it."
        )
    if has_factors(subject):
        file = inspect(Path(str(subject.weights)))
        if file.auxiliary:
            raise UserError(
                f"{subject.weights} holds more than the primary ({file.evidence[0]}): export it"
                " again."
            )
    with as_user_error(f"{RUN} of {folder} is damaged", "give another run"):
        return TypeAdapter(DreamBoothConfig).validate_python(values)


def _require_comparable(points: Mapping[str, Point]) -> None:
    """Raise UserError if the losses of the points are different functions of the weights."""
    first = next(iter(points.values()))
    expected = first.loss
    for point in points.values():
        for name, fact in point.loss.items():
            if fact != expected[name]:
                raise UserError(
                    f"{point.subject.source} and {first.subject.source} differ in {name}, so their"
                    " losses can't be compared: measure them in separate commands."
                )


@dataclass(frozen=True)
class Model:
    """A loaded point: its weights by space, and its loss."""

    spaces: dict[str, list[Weight]]
    loss: LevelGrid


class LevelGrid(GridLoss):
    """The grid loss at some of its noise levels, as a sum of terms.

    Noise, levels and batches are the same as for the losses on the grid in training. With all
    images and levels, the loss equals ``train_grid_loss`` in the run's log, up to the precision of
    the run.
    """

    def __init__(self, task: Any, images: ImageSet, levels: int) -> None:
        # Held-out images are not needed: their set is empty.
        super().__init__(task, SimpleNamespace(images=images), images.only(()))
        self.images = self.sets[TRAINING_GRID_LOSS]
        # Split the grid into `levels` equal parts, and take the middle level of each part: the
        # levels 1, 3, 6 and 8 for a grid of 10 levels and 4 parts.
        middles = [NOISE_LEVELS * (2 * k + 1) // (2 * levels) for k in range(levels)]
        self.level_indices = [self.level_indices[middle] for middle in middles]

    def terms(self) -> Iterator[Tensor]:
        """Yield a term for each batch of images and noise level; the mean loss is their sum."""
        count = len(self.images) * len(self.level_indices)
        for chunk in self.batches(self.images):
            for level in self.level_indices:
                yield self.losses(chunk, level).sum() / count


def load(
    point: Point,
    spaces: Sequence[str],
    *,
    max_images: int = 0,
    levels: int = NOISE_LEVELS,
    device: torch.device | str = "cpu",
) -> Model:
    """Load the base model in float32 with the subject's weights, and set up the loss and spaces.

    Only the primary adapter is active. The base model is not quantized, even if the run's base
    model was. Class images of prior preservation are not part of the loss.

    Args:
        point: the point.
        spaces: "lora", which is skipped for a model without an adapter, and "full".
        max_images: number of training images in the loss, starting with the first; 0 for all.
        levels: number of noise levels in the loss, evenly chosen from the grid of the held-out
            loss.
        device: device of the models.
    """
    subject = point.subject
    # Turn off options that only training needs, or that change the loss or its precision.
    config = replace(
        point.config,
        mixed_precision="no",
        quantize="none",
        gradient_checkpointing=False,
        enable_xformers_memory_efficient_attention=False,
        with_prior_preservation=False,
        validation_prompts=[],
        cache_latents="no",
        disk_cache="no",
        dataloader_num_workers=0,
    )
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        dtype=torch.float32,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        vae=config.pretrained_vae_model_name_or_path,
    )
    weights = subject.weights
    is_adapted = has_factors(subject)
    # The task takes the pipeline's models: replace whole models before, add an adapter afterwards.
    if weights is not None and not is_adapted:
        put_models(pipeline, weights)
    task = DreamBooth(config, pipeline, TrainingStream(config, point.images))
    if weights is not None and is_adapted:
        put_lora(pipeline, weights)
        for name, model in task.models.items():
            _undo_baked_scale(weights, name, model)
    task.module.requires_grad_(False)  # `differentiable` enables gradients for a space's weights
    task.module.eval()
    task.to_device(torch.device(device))
    weights_by_space = {}
    if "lora" in spaces and is_adapted:
        weights_by_space["lora"] = factor_weights(task.models)
    if "full" in spaces:
        weights_by_space["full"] = full_space(task)
    images = point.images.only(range(len(point.images))[: max_images or None])
    return Model(weights_by_space, LevelGrid(task, images, levels))


@torch.no_grad()
def _undo_baked_scale(file: Path, name: str, model: nn.Module) -> None:
    """Divide B by the scale s = alpha / rank that the export has multiplied it by.

    The layer applies s instead, so a radius in the space of A and B has the same meaning as in
    training. If the file does not contain the original alpha, its factors are not changed.
    """
    metadata = inspect(file).metadata
    alphas = json.loads(metadata.get("bilora.original_alpha", "{}"))
    ranks = json.loads(metadata.get("bilora.original_rank", "{}"))
    if name not in alphas:
        return
    for _, layer in adapters.layers(model, PRIMARY):
        up: Any = layer.lora_B[PRIMARY].weight
        scale = alphas[name] / ranks.get(name, layer.r[PRIMARY])
        up.div_(scale / layer.scaling[PRIMARY])
        layer.scaling[PRIMARY] = scale


def factor_weights(models: dict[str, nn.Module]) -> list[Weight]:
    """Return A and B of the primary adapter of every layer.

    The filters are the rows a of A and the columns b of B: each pair of filters is one term b a^T
    of B A. With this choice, a term that is written as (c b) (a / c)^T has the same directions. A
    layer that was not trained has B = 0, which is not moved. DoRA's magnitudes are not in the
    space.
    """
    weights = []
    for name, model in models.items():
        for path, layer in adapters.layers(model, PRIMARY):
            down = cast(Tensor, layer.lora_A[PRIMARY].weight)
            up = cast(Tensor, layer.lora_B[PRIMARY].weight)
            weights.append(Weight(f"{name}.{path}.lora_A", down, 0))
            weights.append(Weight(f"{name}.{path}.lora_B", up, 1))
    return weights


def full_space(task: DreamBooth) -> list[Weight]:
    """Return all weight matrices and convolutions of the trained models, without the adapters.

    A filter consists of the weights of one output.
    """
    weights = []
    for name, model in task.models.items():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and ".lora_" not in path:
                layer = path.replace(".base_layer", "").removesuffix(".weight")
                weights.append(Weight(f"{name}.{layer}", parameter))
    return weights
