"""What a LoRA file says about itself: entries that diffusers, kohya's tools and web UIs read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ..adapters import PRIMARY, factors, layers, lora_config
from ..errors import UserError

ADAPTER_METADATA = "lora_adapter_metadata"
_RESERVED = ("format", ADAPTER_METADATA, "sshs_model_hash", "ss_network_dim", "ss_network_alpha")
# What marks SDXL itself: a file for a smaller pipeline of its kind must not be offered to it.
_SDXL_WIDTH = {
    "unet": ("cross_attention_dim", 2048),
    "text_encoder": ("hidden_size", 768),
    "text_encoder_2": ("hidden_size", 1280),
}


def training_facts(
    *,
    method: str,
    rho: float | None = None,
    date: str | None = None,
    title: str | None = None,
    resolution: int | None = None,
    prediction_type: str | None = None,
    **facts: object,
) -> dict[str, str]:
    """Entries for `save_diffusers(extra_metadata=...)`.

    Args:
        method: the training method, such as "bilora".
        rho: radius of the auxiliary's ball, for a method that has one.
        date: ISO 8601; passed in, so that equal weights give an equal file.
        title: a name for people.
        resolution: edge of the training images in pixels.
        prediction_type: the scheduler's: "epsilon", "v_prediction" or "sample".
        facts: anything else, such as `steps=500`; kept under "bilora.steps". None is left out.
    """
    entries = {
        "modelspec.date": date,
        "modelspec.title": title,
        "modelspec.resolution": resolution and f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "bilora.method": method,
        "bilora.rho": rho,
        **{f"bilora.{key}": value for key, value in facts.items()},
    }
    return {key: str(value) for key, value in entries.items() if value is not None}


def file_metadata(
    models: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    base_model: str,
    name: str,
    extra: Mapping[str, str],
) -> dict[str, str]:
    """The entries that both formats share; "modelspec" is Stability AI's ModelSpec 1.0.0.

    Raises:
        UserError: `extra` sets an entry that describes the tensors, or a value that is not text.
    """
    for key, value in extra.items():
        if key in _RESERVED:
            raise UserError(
                f'extra_metadata sets "{key}", which follows from the weights; drop it.'
            )
        if not isinstance(value, str):
            raise UserError(f'extra_metadata sets "{key}" to {value!r}; turn it into text.')
    trained = {part: factors(model, PRIMARY)[0].A.shape[0] for part, model in models.items()}
    rank = str(next(iter(ranks.values()))) if len(set(ranks.values())) == 1 else "Dynamic"
    real = _is_sdxl(models)
    return {
        "format": "pt",
        "ss_base_model_version": "sdxl_base_v1-0" if real else "sdxl_custom",
        "ss_sd_model_name": Path(base_model).name if Path(base_model).is_dir() else base_model,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-xl-{'v1-base' if real else 'custom'}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "bilora.original_alpha": json.dumps(dict(alphas)),
        **({} if trained == dict(ranks) else {"bilora.original_rank": json.dumps(trained)}),
        **extra,
    }


def adapter_metadata(models: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> str:
    """PEFT's configuration of each primary as JSON, with keys prefixed by the model, for diffusers.

    Only long-standing fields are given, as PEFT refuses unknown ones. Alpha is the rank because B
    has the scale. Dropout is 0: diffusers adds UNet layers in training mode, where it would act.
    """
    entries: dict[str, Any] = {}
    for component, model in models.items():
        config = lora_config(model, PRIMARY)
        targets = config["target_modules"]
        if not isinstance(targets, list):  # a regular expression for this version's module names
            targets = [name for name, _ in layers(model, PRIMARY)]
        own = {
            "peft_type": "LORA",
            "r": ranks[component],
            "lora_alpha": ranks[component],
            "lora_dropout": 0.0,
            "target_modules": targets,
            "use_dora": config["use_dora"],
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": config["fan_in_fan_out"],
            "init_lora_weights": True,
            "inference_mode": True,
        }
        entries.update({f"{component}.{key}": value for key, value in own.items()})
    return json.dumps(entries, indent=2, sort_keys=True)


def model_hash(tensors: dict[str, Tensor]) -> str:
    """sshs_model_hash as kohya's scripts define it: SHA-256 of all that follows the file's header.

    So it depends on the tensors, in the order that safetensors gives them, not on the metadata.
    """
    content = safetensors.torch.save(tensors)
    header = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[header:]).hexdigest()


def _is_sdxl(models: Mapping[str, nn.Module]) -> bool:
    widths = {name: _SDXL_WIDTH[name] for name in models}
    return all(
        getattr(getattr(models[name], "config", None), field, None) == width
        for name, (field, width) in widths.items()
    )
