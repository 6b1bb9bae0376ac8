"""What a LoRA file says about itself: entries that diffusers, kohya's tools and web UIs read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..errors import UserError
from ..lora_names import ADAPTER_METADATA
from .kinds import Names
from .layers import Part

_RESERVED = ("format", ADAPTER_METADATA, "sshs_model_hash", "ss_network_dim", "ss_network_alpha")


def training_facts(
    *,
    method: str,
    rho: float | str | None = None,
    date: str | None = None,
    title: str | None = None,
    resolution: int | None = None,
    prediction_type: str | None = None,
    **facts: object,
) -> dict[str, str]:
    """Entries for `save_diffusers(extra_metadata=...)`.

    Args:
        method: the training method, such as "bilora".
        rho: radius of the auxiliary's ball, for a method that has one, or "auto".
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


def run_facts(
    config: Mapping[str, Any], steps: int, prediction_type: str | None = None
) -> dict[str, str]:
    """`training_facts` of a run, today.

    Args:
        config: the run's options, as `run.json` has them.
        steps: taken by the weights that are exported.
        prediction_type: the scheduler's.
    """
    init = config["init_lora_weights"]
    return training_facts(
        method=config["method"],
        rho=config["rho"],
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        title=Path(config["output_dir"]).resolve().name,
        resolution=config["resolution"],
        prediction_type=prediction_type,
        steps=steps,
        seed=config["seed"],
        init=None if init == "default" else init,
    )


def file_metadata(
    parts: Mapping[str, Part],
    names: Names | None,
    base_model: str,
    name: str,
    extra: Mapping[str, str],
) -> dict[str, str]:
    """The entries that both formats share; "modelspec" is Stability AI's ModelSpec 1.0.0.

    Args:
        parts: what the file holds, by model.
        names: what tools call the model that it is for; None where that is not known.
        base_model: hub id or folder of the pipeline.
        name: what the file is called, without its ending.
        extra: more entries; they win over the others.

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
    ranks = {component: part.file_rank for component, part in parts.items()}
    trained = {component: part.rank for component, part in parts.items()}
    alphas = {component: part.alpha for component, part in parts.items()}
    uniform = len(set(ranks.values())) == 1 and None not in ranks.values()
    rank = str(next(iter(ranks.values()))) if uniform else "Dynamic"
    known = None not in trained.values()
    return {
        **_model_entries(parts, names),
        "format": "pt",
        "ss_sd_model_name": Path(base_model).name if Path(base_model).is_dir() else base_model,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        **({"bilora.original_alpha": json.dumps(alphas)} if known else {}),
        **({"bilora.original_rank": json.dumps(trained)} if known and trained != ranks else {}),
        **extra,
    }


def _model_entries(parts: Mapping[str, Part], names: Names | None) -> dict[str, str]:
    """Which model it is for. The module of kohya's that made it stands for its names of layers,
    which files for transformers do not have.
    """
    entries = {} if "transformer" in parts else {"ss_network_module": "networks.lora"}
    if names is not None:
        entries["ss_base_model_version"] = names.version
        entries["modelspec.architecture"] = f"{names.architecture}/lora"
    return entries


def adapter_metadata(parts: Mapping[str, Part]) -> str:
    """PEFT's configuration of each primary as JSON, with keys prefixed by the model, for diffusers.

    Only long-standing fields are given, as PEFT refuses unknown ones. Alpha is the rank because B
    has the scale. Dropout is 0: diffusers adds layers in training mode, where it would act.
    """
    entries: dict[str, Any] = {}
    for component, part in parts.items():
        own = {
            "peft_type": "LORA",
            "r": part.file_rank,
            "lora_alpha": part.file_rank,
            "lora_dropout": 0.0,
            "target_modules": part.targets,
            "use_dora": part.use_dora,
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": part.fan_in_fan_out,
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
