"""Putting a checkpoint's tensors back, and what an export must know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import adapters
from ..adapters import PRIMARY
from ..errors import UserError
from ..methods import Method


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


def described(method: Method) -> dict[str, Any]:
    """What an export must know of a checkpoint beside its tensors, as JSON can hold it.

    Returns:
        "adapters", PEFT's configuration of each target's primary, and "averaged", the keys in
        `Method.tensors` of what an average is kept of, in its order; {} where whole models are
        trained.
    """
    if method.exports_weights:
        return {}
    models = {target.name: target.model for target in method.targets}
    return {
        "adapters": {name: adapters.lora_config(model, PRIMARY) for name, model in models.items()},
        "averaged": [
            key
            for name, model in models.items()
            for key in (
                *(f"{name}/{PRIMARY}/{p}" for p in adapters.named_parameters(model, PRIMARY)),
                *(f"{name}/whole/{p}" for p in adapters.whole(model, PRIMARY)),
            )
        ],
    }
