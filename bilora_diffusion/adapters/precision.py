"""Precisions to compute in, and stacks of matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    if device.type == "mps":
        return torch.float32
    return torch.float64


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds the values of all tensors, at least fp32."""
    dtypes = {tensor.dtype for tensor in tensors}
    return reduce(torch.promote_types, dtypes, torch.float32)


def exact_stack(matrices: Sequence[Tensor]) -> Tensor:
    """Stack matrices (m, n) of one shape in `exact_dtype`: (matrices, m, n)."""
    stack = torch.stack([full_tensor(matrix) for matrix in matrices])
    return stack.to(exact_dtype(stack.device))


def full_tensor(tensor: Any) -> Tensor:
    """All values of a DTensor, of which FSDP2 keeps a part in each process."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def local_tensor(tensor: Any) -> Tensor:
    """This process's part of a DTensor, to change it in place; any other tensor itself."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor
