"""Conversion of adapters to tensors under PEFT's keys and to PEFT's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.durable import readable_as
from ..core.errors import UserError
from ..core.lora_names import INITIAL, PRIMARY
from .access import head_parameters, layers, named_parameters

PEFT_PREFIX = "base_model.model."


def state_dict(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return contiguous copies of the adapter's tensors by PEFT key ("...lora_A.weight")."""
    tensors: dict[str, Tensor] = {}
    for key, parameter in peft_parameters(model, adapter).items():
        tensors[key] = parameter.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def peft_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by PEFT key."""
    parameters = named_parameters(model, adapter)
    return {peft_key(key): parameter for key, parameter in parameters.items()}


def load_values(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], file: str
) -> None:
    """Copy a file's tensors into parameters; the keys of both mappings are PEFT's.

    Raises:
        UserError: keys or shapes differ.
    """
    differing_keys = sorted(parameters.keys() ^ tensors.keys())
    if differing_keys:
        raise UserError(
            f"{file} and the model do not have the same layers (see {differing_keys[0]}): give a"
            " file for this model and these layers."
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            values = tensors[key]
            if values.shape != parameter.shape:
                raise UserError(
                    f"{file} has {key} with the shape {list(values.shape)}, but the model needs"
                    f" {list(parameter.shape)}: give a file for this model and this rank."
                )
            parameter.copy_(values)


def portable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the primary's tensors relative to the original base weights W.

    If its initial values A0, B0 were subtracted from the base weights, W' = W - s B0 A0, the
    primary's change to W is s (B A - B0 A0) = s [B, -B0] [A; A0], of twice the rank. Otherwise the
    result is `state_dict`. DoRA's magnitude is the same in both cases, since its direction is
    W' + s B A.
    """
    return portable(state_dict(model, PRIMARY), state_dict(model, INITIAL))


def portable(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute `portable_state_dict` from the primary's tensors and initial values, by PEFT key."""
    joined = dict(tensors)
    for key, first in initial.items():
        if key.endswith("lora_A.weight"):
            joined[key] = torch.cat((joined[key], first), dim=0)  # [A; A0], (2 r, n)
        else:
            joined[key] = torch.cat((joined[key], -first), dim=1)  # [B, -B0], (m, 2 r)
    return joined


def lora_config(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Return PEFT's configuration of the adapter as JSON values."""
    config = cast(Any, model).peft_config[adapter]
    text = json.dumps(config.to_dict(), default=sorted, sort_keys=True)  # sets become sorted lists
    return json.loads(text)


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write the primary in PEFT's format: adapter_model.safetensors and adapter_config.json.

    The files apply to the original base weights (`portable_state_dict`).
    """
    tensors, config = pretrained_content(model)
    write_pretrained(folder, tensors, config)


def pretrained_content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the content of `save_pretrained`'s files: tensors by PEFT key, `LoraConfig` fields."""
    config = cast(Any, model).peft_config[PRIMARY].to_dict()
    if layers(model, INITIAL):
        config = twice_the_rank(config)
    return {**portable_state_dict(model), **head_parameters(model, PRIMARY)}, config


def twice_the_rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration for the factors that `portable` joins.

    The rank and alpha are doubled, so the scale stays the same.
    """
    return {**config, "r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}


def write_pretrained(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter's files in PEFT's format.

    Args:
        folder: output folder, which is created if it is missing.
        tensors: tensors by PEFT key, with or without `PEFT_PREFIX`.
        config: fields of PEFT's `LoraConfig`.
        metadata: further entries for the header of the weight file; `format` is always set.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies on the CPU, since safetensors refuses tensors that share memory.
    copies: dict[str, Tensor] = {}
    for key, value in tensors.items():
        contiguous = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        copies[peft_path(key)] = contiguous
    weights_file = folder / SAFETENSORS_WEIGHTS_NAME
    save_file(copies, weights_file, metadata={**(metadata or {}), "format": "pt"})
    peft_config = LoraConfig(**{**config, "inference_mode": True})
    peft_config.save_pretrained(str(folder))
    readable_as(folder / CONFIG_NAME, weights_file)


def peft_path(key: str) -> str:
    """Return a parameter's key in an adapter file."""
    return PEFT_PREFIX + key.removeprefix(PEFT_PREFIX)


def peft_key(key: str) -> str:
    """Return a parameter's key in PEFT's state dict, where DoRA's magnitudes lack ".weight"."""
    if key.endswith("lora_magnitude_vector.weight"):
        return key.removesuffix(".weight")
    return key
