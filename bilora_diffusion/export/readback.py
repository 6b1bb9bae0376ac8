"""Read exported files back and compare them, layer by layer, with the models that were trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..adapters import INITIAL, PRIMARY, factors, names, state_dict
from ..errors import TrainingError, UserError
from ..lora_names import DENOISERS, FILE_NAME, kohya_file_name
from .comparison import compare
from .kinds import kind_of
from .layers import PEFT_PREFIX, Layer
from .lorafile import inspect
from .reader import read


def verify(
    folder: str | Path,
    models: Mapping[str, nn.Module],
    fresh: Callable[[], Mapping[str, nn.Module]] | None = None,
) -> dict[str, float]:
    """Prove that `save_diffusers` wrote the primary of `models` into `folder`, and nothing else.

    The diffusers file is loaded into untrained models by diffusers' own loader; then s * B @ A of
    every layer, and DoRA's magnitude, are compared in fp64. A kohya file is read by `read`, since
    diffusers' reader of that format leaves out DoRA.

    Args:
        folder: where the files are.
        models: the trained models, as given to `save_diffusers`.
        fresh: makes such models without adapters; they are turned into fp32. By default they are
            built from the configurations in memory that is never written, so even SDXL's UNet
            takes next to none.

    Returns:
        "layers", "max_abs_difference", "max_relative_difference", "auxiliary_keys" (always 0) and,
        with a kohya file, "kohya_max_abs_difference" and "kohya_max_relative_difference".

    Raises:
        TrainingError: an auxiliary is inside, a layer is missing or too many, or one differs by
            more than 1e-6 of its norm.
        UserError: a file can't be read, or `fresh` lacks a model or makes one with adapters.
    """
    path, kohya = Path(folder) / FILE_NAME, Path(folder) / kohya_file_name(folder)
    _check_contents(path, models)
    others = fresh() if fresh else untrained(models)
    _load(path, models, others)
    expected = {component: trained(model) for component, model in models.items()}
    loaded = {component: trained(others[component]) for component in models}
    differences = compare(path, expected, loaded)
    report: dict[str, float] = {
        "layers": differences.layers,
        "max_abs_difference": differences.absolute,
        "max_relative_difference": differences.relative,
        "auxiliary_keys": 0,
    }
    if kohya.exists():
        held = {component: part.layers for component, part in read(kohya).parts.items()}
        differences = compare(kohya, expected, held)
        report["kohya_max_abs_difference"] = differences.absolute
        report["kohya_max_relative_difference"] = differences.relative
    return report


def untrained(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Models of the same classes and configurations, in fp32 on the CPU, with arbitrary weights."""
    made = {}
    for component, model in models.items():
        kind, config = cast(Any, type(model)), cast(Any, model).config
        with torch.device("meta"):
            is_diffusers = hasattr(kind, "load_config")
            empty = kind.from_config(config) if is_diffusers else kind(config)
        made[component] = empty.to_empty(device="cpu")
    return made


def _check_contents(path: Path, models: Mapping[str, nn.Module]) -> None:
    contents = inspect(path)
    if contents.auxiliary:
        raise TrainingError(f"{path} must hold the primary alone. {' '.join(contents.evidence)}")
    trained = {component: len(factors(model, PRIMARY)) for component, model in models.items()}
    if contents.layers != trained or contents.other_tensors:
        raise TrainingError(
            f"{path} adapts the layers {contents.layers} and has {contents.other_tensors} other "
            f"tensors, but {trained} were trained."
        )


def _load(path: Path, models: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> None:
    import diffusers  # slow to import, and `inspect` needs it not

    transformer = models.get("transformer")
    name = "StableDiffusionXLPipeline" if transformer is None else kind_of(transformer).pipeline
    loader: Any = getattr(diffusers, name)
    tensors, *_, metadata = loader.lora_state_dict(
        str(path.parent),
        weight_name=path.name,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )
    common = {"network_alphas": None, "metadata": metadata, "adapter_name": PRIMARY}
    for component in models:
        if component not in others:
            raise UserError(f"fresh() makes no {component}; return every model that was exported.")
        if present := names(others[component]):
            raise UserError(f"fresh() makes a {component} with adapters {present}; add none to it.")
        model = others[component].float()
        if component in DENOISERS:
            cast(Any, model).load_lora_adapter(tensors, prefix=component, **common)
        else:
            loader.load_lora_into_text_encoder(
                tensors, text_encoder=model, prefix=component, **common
            )


def trained(model: nn.Module) -> list[Layer]:
    """A model's primary by the definition of what it adds, W + s * (B @ A - B0 @ A0), in fp64."""
    tensors, taken = state_dict(model, PRIMARY), state_dict(model, INITIAL)
    made = []
    for name, _, _, scale in factors(model, PRIMARY):
        A, B = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        if f"{name}.lora_A.weight" in taken:
            A0, B0 = (taken[f"{name}.lora_{side}.weight"].double() for side in "AB")
            A, B = torch.cat((A, A0)), torch.cat((B, -B0), dim=1)
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        made.append(Layer(name.removeprefix(PEFT_PREFIX), A, scale * B, magnitude))
    return made
