"""An adapter as a folder that PEFT loads: what a text run leaves, and proof of what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY
from ..durable import dump_json, sync
from ..errors import TrainingError
from ..lora_names import CONFIG, WEIGHTS

TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
"""PEFT's names for the kinds of model."""


def save_adapter(folder: str | Path, model: nn.Module, *, base_model: str, kind: str) -> Path:
    """Write the primary, and a head that was trained with it, and read both back.

    The two files replace older ones; the configuration comes last, without which PEFT loads none.

    Args:
        folder: the run folder.
        model: with a primary; an auxiliary is left out.
        base_model: hub id or folder that the adapter belongs on.
        kind: "seq2seq", "causal" or "classification".

    Returns:
        The path of the weights.

    Raises:
        TrainingError: a value is not finite.
    """

    def write(aside: Path) -> None:
        adapters.save_pretrained(model, aside)

    return place_adapter(Path(folder), write, base_model=base_model, kind=kind)


def place_adapter(
    folder: Path, write: Callable[[Path], None], *, base_model: str, kind: str
) -> Path:
    """`save_adapter` of what `write` puts into a folder.

    Raises:
        TrainingError: a value is not finite.
    """
    aside = folder / ".adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    for key, value in load_file(aside / WEIGHTS).items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(f"{key} is not finite, so nothing is exported: take a checkpoint.")
    config = json.loads((aside / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base_model, "task_type": TASK_TYPES[kind]}
    (aside / CONFIG).write_text(dump_json(config), encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        sync(aside / name)
        os.replace(aside / name, folder / name)
    sync(folder)
    shutil.rmtree(aside)
    return folder / WEIGHTS


def verify_adapter(folder: str | Path, model: nn.Module) -> dict[str, Any]:
    """Compare a folder with the model that it was written from.

    Returns:
        ``layers``, ``parameters``, ``whole_modules`` and ``readback_difference``, the largest
        difference between a tensor of the file and the model's, 0.0.

    Raises:
        TrainingError: the file holds other keys (an auxiliary among them) or other values.
    """
    stored = load_file(Path(folder) / WEIGHTS)
    wanted = {
        adapters.peft_path(key): value
        for key, value in (
            *adapters.portable_state_dict(model).items(),
            *adapters.whole(model, PRIMARY).items(),
        )
    }
    odd = sorted(stored.keys() ^ wanted.keys())
    if odd or any(AUXILIARY in key for key in stored):
        raise TrainingError(f"{WEIGHTS} does not hold the primary alone: look at {odd[:1]}.")
    largest = max(float((stored[k] - v.detach().cpu()).abs().max()) for k, v in wanted.items())
    if largest > 0:
        raise TrainingError(f"{WEIGHTS} differs from the model by {largest}.")
    return {
        "layers": len(adapters.layers(model, PRIMARY)),
        "parameters": sum(value.numel() for value in stored.values()),
        "whole_modules": sorted(adapters.whole(model, PRIMARY)),
        "readback_difference": largest,
    }
