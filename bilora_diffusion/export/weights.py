"""Whole models in a run folder: what full fine-tuning leaves, as `from_pretrained` reads them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import nn

from ..durable import readable_as
from ..errors import TrainingError


def save_models(folder: str | Path, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Write each model to `folder/name` and compare what the files hold with the model.

    A model appears whole or not at all, and replaces an older one.

    Args:
        folder: the run folder.
        models: diffusers or Transformers models by their names in the pipeline.

    Returns:
        For each model the number of its weights and the largest difference on reading back, 0.0.

    Raises:
        TrainingError: a weight is not finite, or the files hold something else.
    """
    report = {}
    for name, model in models.items():
        final = Path(folder) / name
        aside = Path(folder) / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        cast(Any, model).save_pretrained(aside, safe_serialization=True)
        readable_as(aside / "config.json", *aside.glob("*.safetensors"))
        report[name] = _compare(name, aside, model)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    return report


def _compare(name: str, folder: Path, model: nn.Module) -> dict[str, Any]:
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    parameters = {key: p.detach().cpu() for key, p in model.named_parameters()}
    if missing := parameters.keys() - stored.keys():
        # Transformers leaves out what is tied to another weight.
        tied = {id(p) for key, p in model.named_parameters() if key in stored}
        own = dict(model.named_parameters())
        if any(id(own[key]) not in tied for key in missing):
            raise TrainingError(f"{folder.name} lacks {sorted(missing)[0]} of {name}.")
    largest = 0.0
    for key in parameters.keys() & stored.keys():
        if not parameters[key].isfinite().all():
            raise TrainingError(f"{name}.{key} is not finite; export a good checkpoint.")
        largest = max(largest, float((parameters[key] - stored[key]).abs().max()))
    if largest > 0:
        raise TrainingError(f"{name} differs from its file by {largest}.")
    weights = sum(p.numel() for p in model.parameters())
    return {"weights": weights, "readback_difference": largest}
