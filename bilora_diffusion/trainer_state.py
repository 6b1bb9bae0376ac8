"""Putting a checkpoint's tensors back into the models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import UserError


@torch.no_grad()
def load_tensors(current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into the parameters that they were taken from.

    Raises:
        UserError: a parameter is missing, superfluous, or of another shape.
    """
    if current.keys() != saved.keys():
        odd = sorted(current.keys() ^ saved.keys())[0]
        raise UserError(
            f"the checkpoint and the model disagree on the parameter '{odd}': resume with the"
            " flags that the run was started with."
        )
    for name, parameter in current.items():
        if parameter.shape != saved[name].shape:
            raise UserError(
                f"'{name}' has shape {tuple(saved[name].shape)} in the checkpoint and"
                f" {tuple(parameter.shape)} in the model: resume with the run's own flags."
            )
    for name, parameter in current.items():
        parameter.copy_(saved[name])
