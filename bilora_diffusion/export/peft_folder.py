"""An adapter as a folder that PEFT loads: what a text run leaves, and proof of what is in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY
from ..durable import sync
from ..errors import TrainingError, UserError
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

    folder = Path(folder)
    tensors, config = adapters.pretrained(model)
    place_adapter(folder, tensors, described(config, base_model, kind))
    return folder / WEIGHTS


def described(config: Mapping[str, Any], base_model: str, kind: str) -> dict[str, Any]:
    """An adapter's configuration with what PEFT must know of the model that it belongs on."""
    return {**config, "base_model_name_or_path": base_model, "task_type": TASK_TYPES[kind]}


def place_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], object] = bool,
) -> None:
    """Write an adapter's two files aside, read them back, and give them their names.

    Args:
        folder: made if need be.
        tensors, config, metadata: see `adapters.write_pretrained`.
        check: looks at the file of weights before it gets its name.

    Raises:
        TrainingError: a value is not finite, or the file holds something else.
    """
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(f"{key} is not finite, so nothing is exported: take a checkpoint.")
    aside = folder / ".adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        adapters.write_pretrained(aside, tensors, config, metadata)
        _compare(aside / WEIGHTS, tensors)
        check(aside / WEIGHTS)
        for name in (WEIGHTS, CONFIG):
            sync(aside / name)
            os.replace(aside / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(*folders: Path) -> None:
    """Refuse to put an adapter where one is.

    Raises:
        UserError: a folder is a file, or has a file of an adapter.
    """
    for folder in folders:
        if folder.suffix == ".safetensors" or folder.is_file():
            raise UserError(f"{folder} is a file, and PEFT's format is a folder; name a folder.")
        for path in (folder / WEIGHTS, folder / CONFIG):
            if path.exists():
                raise UserError(f"{path} exists; name another --output, or delete it.")


def verify_adapter(folder: str | Path, model: nn.Module) -> dict[str, Any]:
    """Compare a folder with the model that it was written from.

    Returns:
        ``layers``, ``parameters``, ``whole_modules`` and ``readback_difference``, which is 0.0.

    Raises:
        TrainingError: the file holds other keys (an auxiliary among them) or other values.
    """
    tensors, _ = adapters.pretrained(model)
    _compare(Path(folder) / WEIGHTS, tensors)
    return {
        "layers": len(adapters.layers(model, PRIMARY)),
        "parameters": sum(value.numel() for value in tensors.values()),
        "whole_modules": sorted(adapters.whole(model, PRIMARY)),
        "readback_difference": 0.0,
    }


def _compare(file: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = load_file(file)
    expected = {adapters.peft_path(key): value for key, value in tensors.items()}
    odd = sorted(stored.keys() ^ expected.keys())
    if odd or any(AUXILIARY in key for key in stored):
        raise TrainingError(f"{WEIGHTS} does not hold the primary alone: look at {odd[:1]}.")
    for key, value in expected.items():
        if not torch.equal(stored[key], value.detach().cpu()):
            raise TrainingError(f"{key} of {WEIGHTS} differs from the model: export it once more.")
