"""Command lines for short runs on the miniature, and comparisons of what they exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bilora_diffusion.run import runlog


def flags(folder: Path, **values: Any) -> list[str]:
    """A short run on the miniature without held-out loss and images; True is a bare flag."""
    settings: dict[str, Any] = {
        "dataset": "mini",
        "validation_dataset": "none",
        "num_validation_images": 0,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "output_dir": folder,
        **values,
    }
    argv: list[str] = []
    for name, value in settings.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run: of the adapter, or of the whole UNet."""
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(whole if whole.exists() else folder / "pytorch_lora_weights.safetensors")


def column(folder: Path, key: str) -> list[Any]:
    """One value of the run's metrics, at each step that has it."""
    return [row[key] for row in runlog.read_metrics(folder) if key in row]


def difference(a: Path, b: Path) -> float:
    """The largest difference between two runs' exported weights."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)
