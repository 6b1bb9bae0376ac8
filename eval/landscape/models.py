"""A point of the landscape in memory: its model, its weights by space, and its loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.choices import NOISE_LEVELS
from bilora_diffusion.errors import UserError
from bilora_diffusion.export import inspect
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.image.heldout import GridLoss, grid_levels
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.image.visits import VisitStream
from bilora_diffusion.run.folder import WHOLE_MODELS

from ..subjects import BASE
from .runs import Point, has_factors
from .weights import Weight


@dataclass(frozen=True)
class Model:
    """A loaded point: ``spaces`` has the weights of each space asked for that it has."""

    spaces: dict[str, list[Weight]]
    loss: Grid


class Grid(GridLoss):
    """The grid loss of some images at some of its noise levels, as terms that add up to the mean.

    Noise, levels and batches are those of the held-out loss in training. With all images and
    levels it equals ``train_grid_loss`` or ``heldout_loss`` of the run's log.
    """

    def __init__(self, task: Any, chosen: ImageSet, levels: int) -> None:
        super().__init__(task, SimpleNamespace(images=chosen), chosen.only(()))
        self.images = self.sets["train_grid_loss"]
        known = grid_levels(task.module.denoising.num_timesteps)
        self.levels = [known[NOISE_LEVELS * (2 * k + 1) // (2 * levels)] for k in range(levels)]

    def terms(self) -> Iterator[Tensor]:
        """One term per batch of images and noise level; their sum is the mean over both."""
        count = len(self.images) * len(self.levels)
        for chunk in self.batches(self.images):
            for level in self.levels:
                yield self.losses(chunk, level).sum() / count


def load(
    point: Point,
    spaces: Sequence[str],
    full_weights: str = "all",
    *,
    max_images: int = 0,
    levels: int = NOISE_LEVELS,
    device: torch.device | str = "cpu",
) -> Model:
    """Load the base in float32, put the subject's weights on it, and set up loss and spaces.

    The adapter alone acts. Of a quantized run the base is taken unquantized; class images of prior
    preservation are left out of the loss.

    Args:
        spaces: "lora", left out where there is no adapter, and "full".
        full_weights: see :func:`full_space`.
        max_images: of the loss, the first so many of the set; 0 for all.
        levels: noise levels of the loss, evenly chosen from those of the held-out loss.

    Raises:
        UserError: base model or export can't be loaded.
    """
    config, subject = _plain(point.config), point.subject
    pipeline = _pipeline(config)
    task = DreamBooth(config, pipeline, VisitStream(config, point.images))
    try:
        if has_factors(subject):
            _load_adapter(Path(str(subject.weights)), task, pipeline)
        elif subject.kind != BASE:
            _load_whole(Path(str(subject.weights)), pipeline)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{subject.source} does not fit the base model ({reason}): export or train it again."
        ) from error
    task.module.requires_grad_(False)
    task.module.eval()
    task.to_device(torch.device(device))
    held = {}
    if "lora" in spaces and has_factors(subject):
        held["lora"] = factor_weights(task.models)
    if "full" in spaces:
        held["full"] = full_space(task, full_weights)
    images = point.images.only(range(len(point.images))[: max_images or None])
    return Model(held, Grid(task, images, levels))


def _plain(config: DreamBoothConfig) -> DreamBoothConfig:
    return replace(
        config,
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


def _pipeline(config: DreamBoothConfig) -> Any:
    return load_pipeline(
        config.pretrained_model_name_or_path,
        dtype=torch.float32,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        vae=config.pretrained_vae_model_name_or_path,
    )


def _load_adapter(file: Path, task: DreamBooth, pipeline: Any) -> None:
    pipeline.load_lora_weights(
        str(file.parent),
        weight_name=file.name,
        adapter_name=PRIMARY,
        local_files_only=True,
        use_safetensors=True,
    )
    for name, model in task.models.items():
        _undo_baked_scale(file, name, model)


@torch.no_grad()
def _undo_baked_scale(file: Path, name: str, model: nn.Module) -> None:
    """Divide B by the scale s that the export multiplied into it, and let the layer apply s.

    Radii in the space of A and B are then those of training. Files without the original alpha keep
    their own factors.
    """
    metadata = inspect(file).metadata
    alphas = json.loads(metadata.get("bilora.original_alpha", "{}"))
    ranks = json.loads(metadata.get("bilora.original_rank", "{}"))
    for _, layer in adapters.layers(model, PRIMARY):
        if name not in alphas:
            continue
        up: Any = layer.lora_B[PRIMARY].weight
        scale = alphas[name] / ranks.get(name, layer.r[PRIMARY])
        up.div_(scale / layer.scaling[PRIMARY])
        layer.scaling[PRIMARY] = scale


def _load_whole(folder: Path, pipeline: Any) -> None:
    for name in WHOLE_MODELS:
        if (folder / name).is_dir():
            model = getattr(pipeline, name)
            trained = type(model).from_pretrained(
                folder / name, local_files_only=True, use_safetensors=True
            )
            model.load_state_dict(trained.state_dict())


def factor_weights(models: dict[str, nn.Module]) -> list[Weight]:
    """A and B of every layer's primary.

    The filters are the rows of A and the columns of B, so one pair is one term b a^T of B A. Then
    the direction does not depend on how a term's size is shared among its two vectors. A layer that
    was not trained has B = 0, which stays 0; DoRA's magnitudes are left out.
    """
    held = []
    for name, model in models.items():
        for path, layer in adapters.layers(model, PRIMARY):
            down, up = (cast(Tensor, side[PRIMARY].weight) for side in (layer.lora_A, layer.lora_B))
            held.append(Weight(f"{name}.{path}.lora_A", down, 0))
            held.append(Weight(f"{name}.{path}.lora_B", up, 1))
    return held


def full_space(task: DreamBooth, full_weights: str) -> list[Weight]:
    """The weights of the trained models without the adapters; a filter is an output's weights.

    Args:
        task: its models, with or without adapters.
        full_weights: "all" weight matrices and convolutions of the models, or only those that the
            adapters sit on. Biases and norms are left out, as in Li et al. 2018.
    """
    held = []
    for target in task.targets():
        model, own = target.model, dict[str, Tensor]()
        if full_weights == "adapted":
            layers = adapters.target_layers(model, target.spec)
            own |= {
                path: cast(Tensor, getattr(layer, "base_layer", layer).weight)
                for path, layer in layers.items()
            }
        else:
            own |= {
                path.replace(".base_layer", "").removesuffix(".weight"): parameter
                for path, parameter in model.named_parameters()
                if parameter.dim() > 1 and ".lora_" not in path
            }
        held += [Weight(f"{target.name}.{path}", tensor, 0) for path, tensor in own.items()]
    return held
