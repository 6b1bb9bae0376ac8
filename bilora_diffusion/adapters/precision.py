"""Data types for computations, stacks of matrices, and access to the values of DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64 if the device supports it, else float32."""
    if device.type == "mps":
        return torch.float32
    return torch.float64


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the narrowest dtype, fp32 or wider, that can hold the values of all tensors."""
    dtypes = {tensor.dtype for tensor in tensors}
    return reduce(torch.promote_types, dtypes, torch.float32)


def exact_stack(matrices: Sequence[Tensor]) -> Tensor:
    """Stack matrices of the same shape (m, n) into (matrices, m, n), in `exact_dtype`."""
    stack = torch.stack([full_tensor(matrix) for matrix in matrices])
    return stack.to(exact_dtype(stack.device))


def full_tensor(tensor: Any) -> Tensor:
    """Return all values of a DTensor, which FSDP2 splits across processes, or the tensor itself."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def local_tensor(tensor: Any) -> Tensor:
    """Return this process's part of a DTensor, for changes in place, or the tensor itself."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor
