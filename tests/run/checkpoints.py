"""A checkpoint in a folder."""

from pathlib import Path
from typing import Any

import torch

from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import Checkpoint


def save(folder: Path, step: int = 1, value: float = 0.0, **parts: Any) -> Path:
    """A checkpoint that holds ``value`` in each part that is not given."""
    given: dict[str, Any] = {
        "tensors": {"unet.default.a": torch.full((3, 2), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(value)}}, "param_groups": []},
        "scheduler": {},
        "scaler": None,
        "extra": {"value": value},
    }
    return checkpoint.save(folder, Checkpoint(step, **{**given, **parts}))
