"""Models of which nothing but shapes is there: their weights are on PyTorch's device "meta"."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn


def empty(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """``build()`` in evaluation mode, with frozen weights of a dtype that take no memory."""
    with init_empty_weights(include_buffers=True):
        model = build()
    if tie := getattr(model, "tie_weights", None):
        tie()  # each use of a shared matrix was made on its own
    return nn.Module.to(model, dtype).requires_grad_(False).eval()
