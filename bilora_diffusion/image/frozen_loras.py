"""Check that LoRA files fit a pipeline's models, and read their frozen adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import ASSISTANT, SAMPLING, FrozenAdapter
from ..adapters.injection import base_of
from ..config.lora_sources import LoraSource
from ..core.errors import UserError
from ..core.lora_names import COMPONENTS, ENCODERS
from ..export.formats import Part, peft_adapter, plain_name
from ..export.lora_checks import warn_of_other_base
from ..export.reader import read
from .config import DreamBoothConfig

# Option of a LoRA file that acts together with the trained adapters -> its adapter's name.
FROZEN_OPTIONS = {"assistant_lora": ASSISTANT, "sampling_lora": SAMPLING}
FIX = "give the base model that the file was trained on"


def models_of(pipeline: Any) -> dict[str, Any]:
    """Return the models of a pipeline that a LoRA file can have layers for, by name."""
    models = {}
    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if model is not None:
            models[name] = model
    return models


def read_frozen_of_run(
    cfg: DreamBoothConfig, pipeline: Any, models: Mapping[str, nn.Module]
) -> dict[str, tuple[FrozenAdapter, ...]]:
    """Read the LoRA files that act together with the trained adapters.

    Returns:
        The frozen adapters of each model, by the model's name.
    """
    frozen: dict[str, tuple[FrozenAdapter, ...]] = dict.fromkeys(models, ())
    for option, adapter in FROZEN_OPTIONS.items():
        source = cfg.lora_sources.get(option)
        if source is None:
            continue
        adapters_of_file = read_frozen(source, adapter, pipeline, models, cfg.base_model)
        for name, frozen_adapter in adapters_of_file.items():
            frozen[name] += (frozen_adapter,)
    return frozen


def read_frozen(
    source: LoraSource,
    adapter: str,
    pipeline: Any,
    models: Mapping[str, nn.Module],
    base_model: str,
) -> dict[str, FrozenAdapter]:
    """Read a LoRA file as frozen adapters of the trained models.

    Args:
        source: the file and its strength; at strength 0, the file is only checked.
        adapter: name of the adapter on the models, one of `lora_names.FROZEN`.
        pipeline: the loaded pipeline.
        models: the pipeline's trained models, by name.
        base_model: name of the base model, as the user gave it.

    Returns:
        The adapter of each model that the file has layers for, by the model's name.

    Raises:
        UserError: the file can't be read, does not fit the pipeline, or has layers for a text
            encoder that is not trained.
    """
    contents = read(source.path)
    parts = require_fit(source.path, contents.parts, models_of(pipeline))
    untrained = sorted(parts.keys() - models.keys())
    if untrained:
        # Prompts for training and sampling are embedded once, before the file becomes active.
        fix = "give a file without them"
        if not set(untrained) - set(ENCODERS):
            fix = f"add --train_text_encoder, or {fix}"
        raise UserError(
            f"--{source.option} {source.path} has layers for models that are not trained"
            f" ({', '.join(untrained)}), where they have no effect: {fix}."
        )
    warn_of_other_base(source, contents.base_model, base_model)
    frozen_adapters = {}
    if source.strength != 0:
        for name, part in parts.items():
            tensors, config = peft_adapter(name, part, "")
            frozen_adapters[name] = FrozenAdapter(adapter, tensors, config, source.strength)
    return frozen_adapters


def require_fit(
    file: Path, parts: Mapping[str, Part], models: Mapping[str, nn.Module]
) -> dict[str, Part]:
    """Check that each layer of a LoRA file matches a module of a pipeline by name and shape.

    Args:
        file: the file, for messages.
        parts: the file's layers, by the model's name.
        models: the pipeline's models, by name; they may have adapters or lack weights.

    Returns:
        The file's layers, renamed to the paths of their modules.

    Raises:
        UserError: a layer has no module that can have a LoRA, or the module has another shape.
    """
    placed: dict[str, Part] = {}
    missing: list[str] = []
    count = 0
    for component, part in parts.items():
        modules: dict[str, tuple[str, nn.Module]] = {}
        if component in models:
            for path, module in models[component].named_modules():
                modules[plain_name(path)] = path, module
        layers = []
        for layer in part.layers:
            count += 1
            path, module = modules.get(layer.name, ("", None))
            shapes = None if module is None else _factor_shapes(base_of(module))
            if shapes is None:
                missing.append(f"{component}.{layer.name}")
                continue
            file_shapes = tuple(layer.A.shape[1:]), layer.B.shape[0]
            if file_shapes != shapes:
                raise UserError(
                    f"{file} does not fit the base model: {component}.{path} has {_sides(*shapes)}"
                    f" in the model, but {_sides(*file_shapes)} in the file; {FIX}."
                )
            layers.append(layer._replace(name=path))
        placed[component] = Part(layers, part.rank, part.alpha)
    if missing:
        raise UserError(
            f"{file} does not fit the base model, which has no layer for {len(missing)} of the"
            f" file's {count}, such as {min(missing)}: {FIX}."
        )
    return placed


def _factor_shapes(module: nn.Module) -> tuple[tuple[int, ...], int] | None:
    """Return the dimensions of A after the rank, and the number of outputs of B.

    None if the module takes no LoRA.
    """
    if isinstance(module, nn.Linear):
        return (module.in_features,), module.out_features
    if isinstance(module, nn.Conv2d):
        return (module.in_channels // module.groups, *module.kernel_size), module.out_channels
    return None


def _sides(inputs: tuple[int, ...], outputs: int) -> str:
    """Return a layer's dimensions in words, such as "64 inputs and 128 outputs"."""
    return f"{' x '.join(map(str, inputs))} inputs and {outputs} outputs"
