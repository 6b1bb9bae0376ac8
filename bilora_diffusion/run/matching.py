"""Whether what is resumed fits what was saved: settings and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def require_same_settings(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str] = frozenset()
) -> None:
    """Refuse to go on under other settings. Tuples equal lists, NaN equals NaN, True is not 1.

    Args:
        saved: settings that the checkpoint was made with.
        current: those of this run.
        free: keys that may differ.

    Raises:
        UserError: names up to three differing keys with both values.
    """
    keys = [key for key in {**saved, **current} if key not in free]
    before, now = (
        [json.dumps(values[key], default=str) if key in values else "not set" for key in keys]
        for values in (saved, current)
    )
    rows = zip(keys, before, now, strict=True)
    wrong = [f"{key} was {was} and is {is_now}" for key, was, is_now in rows if was != is_now]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint is of another config ({'; '.join(wrong[:3])}{more}): use the same "
            "values to resume, or start a new run in another --output_dir"
        )


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
