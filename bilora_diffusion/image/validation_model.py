"""``--validation_model``: generate images with another model's weights, such as a distilled one's.

The weights of the other model have the same shapes as those of the trained model. They replace the
base weights while images are generated, so all adapters act on them. Otherwise they are on the CPU:

    model = load_validation_model(cfg, pipeline, dtype)
    with model.acting():
        images = generate(model.pipeline, ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import is_adapter_weight
from ..core.errors import UserError, read_or_refuse
from .base_model import folder_of
from .config import DreamBoothConfig
from .families.base import Family
from .pipeline import download, load_part, part_label

FLAG = "--validation_model"
FIX = f"give another {FLAG}"


@dataclass
class ValidationModel:
    """Another model of the base model's class, whose weights generate the validation images.

    Attributes:
        pipeline: pipeline with the other model's configuration and scheduler, whose denoiser is the
            trained one.
        weights: weights of the other denoiser, by name, on the CPU.
        denoiser: the trained denoiser.
    """

    pipeline: Any
    weights: Mapping[str, Tensor]
    denoiser: nn.Module

    @property
    def bytes_(self) -> int:
        """Size of the weights in bytes."""
        return sum(weight.nbytes for weight in self.weights.values())

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Replace the base weights within the context, and restore them exactly afterwards."""
        # Pairs of a tensor and its base weight, which is moved to the CPU. Tensors are replaced one
        # at a time, so that the device never holds two versions of more than one of them.
        base_weights: list[tuple[Tensor, Tensor]] = []
        try:
            for name, tensor in base_tensors(self.denoiser).items():
                base_weights.append((tensor, tensor.data.to("cpu")))
                tensor.data = self.weights[name].to(tensor.device)
            yield
        finally:
            for tensor, base_weight in base_weights:
                tensor.data = base_weight.to(tensor.device)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers without adapters, by their base-model names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_adapter_weight(name):
            tensors[name.replace(".base_layer", "").replace("_orig_mod.", "")] = tensor
    return tensors


def load_validation_model(
    cfg: DreamBoothConfig, pipeline: Any, dtype: torch.dtype, *, weights: bool = True
) -> ValidationModel | None:
    """Load the model of ``--validation_model``; return None if it is not given.

    Args:
        pipeline: the loaded base model, without adapters.
        dtype: dtype of its denoiser.
        weights: False to build the model without weights, which takes no memory.

    Raises:
        UserError: the model can't be loaded, or its denoiser's weights have other names or shapes
            than the base model's.
    """
    name = cfg.validation_model
    if name is None:
        return None
    family: Family = cfg.family
    folder = folder_of(name)
    if folder is None:
        unused = set(pipeline.components) - {family.denoiser, "scheduler"}
        folder = download(name, None, None, cfg.cache_dir, unused_parts=unused, weights=weights)
    denoiser = family.model(pipeline)
    sampled_denoiser = load_part(
        part_label(family.denoiser, name),
        type(denoiser),
        folder,
        f"download it again, or {FIX}",
        weights=weights,
        subfolder=family.denoiser,
        dtype=dtype,
    )
    tensors, other_tensors = base_tensors(denoiser), base_tensors(sampled_denoiser)
    for key in [*tensors, *other_tensors]:
        shapes = [list(group[key].shape) for group in (tensors, other_tensors) if key in group]
        if len(shapes) == 1 or shapes[0] != shapes[1]:
            raise UserError(
                f'{FLAG} "{name}" differs in shape from the base model at {key}'
                f" ({' and '.join(map(str, shapes))}): give a model that was derived from it."
            )
    # Sampling needs the encoders only if they are trained; other runs embed the prompts before.
    parts = {part: None for part in family.encoders if not cfg.train_text_encoder}
    components = {**pipeline.components, **parts}
    del components["scheduler"]
    kind: Any = type(pipeline)
    sampled = read_or_refuse(
        f'{FLAG} "{name}"',
        f"correct its files, or {FIX}",
        partial(kind.from_pretrained, folder, **components, use_safetensors=True),
    )
    sampled.register_to_config(_name_or_path=name)
    sampled.set_progress_bar_config(disable=True)
    return ValidationModel(sampled, other_tensors, denoiser)
