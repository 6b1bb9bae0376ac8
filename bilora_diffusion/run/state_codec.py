"""An optimizer's state as tensors by name and JSON, so that no checkpoint needs a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON of a ``state_dict``, and its tensors by path, such as "state/0/exp_avg".

    Null stands in a tensor's place. Tuples come back as lists.

    Raises:
        TypeError: for a value that would not come back.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, *path: str) -> Any:
        if isinstance(value, Tensor):
            tensors["/".join(path)] = value
            return None
        if isinstance(value, Mapping):
            return {str(key): plain(item, *path, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, *path, str(number)) for number, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{'/'.join(path)} is a {type(value).__name__}, which JSON can't hold")

    return plain(state), tensors


def join(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that `split` took apart; ``rest`` is changed."""
    for path, tensor in tensors.items():
        place: Any = rest
        *way, last = path.split("/")
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = tensor
    return {**rest, "state": {int(number): own for number, own in rest["state"].items()}}


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory.

    Raises:
        TypeError: for a tensor of a subclass (sharded, quantized), of which a part would be lost.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    layout: Any = {"copy": True, "memory_format": torch.contiguous_format}
    return {name: tensor.detach().to("cpu", **layout) for name, tensor in tensors.items()}
