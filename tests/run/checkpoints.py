"""What the tests of checkpoints share."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import Checkpoint, latest, load


def same(a: Any, b: Any) -> bool:
    """Equality of types, keys and their order, float bits and tensor bytes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = (
            t.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for t in (a, b)
        )
        return torch.equal(left, right)
    if isinstance(a, float):
        return (a != a and b != b) or struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return same(list(a.keys()), list(b.keys())) and all(same(a[key], b[key]) for key in a)
    return a == b


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


def load_latest(folder: Path) -> Checkpoint:
    path = latest(folder)
    assert path is not None
    return load(path)
