"""``--validation_model``: sample with the weights of another model, such as a distilled one.

The other model has the shape of the trained one. Its weights take the place of the base weights
while images are sampled, so that all adapters act on it, and are on the CPU otherwise:

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
    """Another model of the base model's kind, of which images are sampled.

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
        """Size of the weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Put the weights in the place of the base weights, which are restored to the bit."""
        # Base weights on the CPU, in their order, with the tensors that they belong to. One layer
        # after another, so that the device has no second copy of more than one.
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
    """Parameters and buffers of a model without its adapters, by their names without adapters."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_adapter_weight(name):
            tensors[name.replace(".base_layer", "").replace("_orig_mod.", "")] = tensor
    return tensors


def load_validation_model(
    cfg: DreamBoothConfig, pipeline: Any, dtype: torch.dtype, *, weights: bool = True
) -> ValidationModel | None:
    """Load the model of ``--validation_model``; None without the option.

    Args:
        pipeline: the loaded base model, without adapters.
        dtype: dtype of its denoiser.
        weights: False for weights that take no memory.

    Raises:
        UserError: it can't be loaded, or its denoiser has other weights than the base model's.
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
                f'{FLAG} "{name}" has another shape than the base model at {key}'
                f" ({' and '.join(map(str, shapes))}): give a model that was made from it."
            )
    # Encoders only where they are trained: those of other runs are deleted before training.
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
