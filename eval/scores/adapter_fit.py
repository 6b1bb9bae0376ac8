"""Whether a LoRA file fits a pipeline, tensor by tensor, before anything is changed.

diffusers only warns of keys that name no layer, and loads the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from bilora_diffusion.errors import UserError
from bilora_diffusion.export import COMPONENTS, inspect


def require_fit(pipeline: Any, file: Path) -> None:
    """Refuse a file that diffusers would load in part, wrongly, or with an auxiliary.

    Raises:
        UserError: it names the file and the first tensor without a layer.
    """
    contents = inspect(file)
    if contents.auxiliary:
        raise UserError(f"{file} holds more than a primary: {' '.join(contents.evidence)}")
    if contents.dora and contents.format == "kohya":
        raise UserError(
            f"{file} is DoRA in kohya's format, of which diffusers leaves out the magnitudes: give"
            " the file in diffusers' format (python -m bilora_diffusion.export FILE --to"
            " diffusers writes it)."
        )
    try:
        tensors, *_ = pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            unet_config=pipeline.unet.config,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is of a kind that diffusers can't read ({reason}).") from error
    wrong = _without_component(tensors)
    for component in COMPONENTS:
        wrong += _without_layer(component, getattr(pipeline, component), tensors)
    if wrong:
        raise UserError(
            f"{file} does not fit the base model, which has no layer for {len(wrong)} of its"
            f" {len(tensors)} tensors, such as {wrong[0]}: give the base model that it was trained"
            " on."
        )


def _without_component(tensors: dict[str, Tensor]) -> list[str]:
    known = tuple(f"{component}." for component in COMPONENTS)
    return [f"{key} {tuple(t.shape)}" for key, t in tensors.items() if not key.startswith(known)]


def _without_layer(component: str, model: Any, tensors: dict[str, Tensor]) -> list[str]:
    prefix = f"{component}."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not own:
        return []
    if component != "unet":
        own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    elif "lora_A" not in next(iter(own)):
        own = convert_unet_state_dict_to_peft(own)
    weights = {
        name.removeprefix("text_model."): module.weight
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    }
    return [
        f"{prefix}{key} {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if not _fits(key.removeprefix("text_model."), tensor, weights)
    ]


def _fits(key: str, tensor: Tensor, weights: dict[str, Any]) -> bool:
    name, _, part = key.rpartition(".lora_")
    weight = weights.get(name)
    if weight is None or not name:
        return False
    if part.startswith("A."):  # (r, n), for a convolution (r, channels, height, width)
        return tensor.shape[1:] == weight.shape[1:]
    if part.startswith("B."):  # (m, r)
        return tensor.shape[0] == weight.shape[0]
    return tensor.numel() == weight.shape[0]  # DoRA's magnitudes, (m,)
