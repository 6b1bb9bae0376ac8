"""Nested state dicts as JSON plus named tensors, and back, exactly.

What JSON has is written as it is; everything else as an object with the one key ``$``, whose value
is ``[kind, payload]``:

    tensor        name in the tensor file
    tuple         list of items
    float         "nan", "inf" or "-inf" (finite floats are JSON numbers: Python's repr is exact)
    dict          list of [key, value] pairs; used when a key is not a string or is "$"
    OrderedDict, Counter   the same

So no pickle is needed for the state of an optimizer, a scheduler or a gradient scaler.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MARK = "$"
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


class Tensors:
    """The tensors of one file: names them, and stores one object that is met twice only once."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._seen: dict[
            int, tuple[Tensor, str]
        ] = {}  # holding the tensor keeps its id from being reused

    def add(self, tensor: Tensor, path: str) -> str:
        if id(tensor) in self._seen:
            return self._seen[id(tensor)][1]
        base = re.sub(r"[^\w./-]", "_", path, flags=re.ASCII)
        name, count = base, 1
        while name in self.named:
            count += 1
            name = f"{base}~{count}"
        self.named[name] = tensor
        self._seen[id(tensor)] = (tensor, name)
        return name


def encode(value: Any, path: str, tensors: Tensors) -> Any:
    """``value`` as JSON; its tensors are added to ``tensors``, named after ``path``.

    Args:
        value: None, bool, int, float, str, Tensor, list, tuple, dict, OrderedDict or Counter,
            nested at will.
        path: where the value stands, e.g. ``"optimizer"``; part of tensor names and error messages.

    Raises:
        TypeError: for a value of any other type, subclasses included, since it would come back as
            another.
    """
    if isinstance(value, Tensor):
        return {MARK: ["tensor", tensors.add(value, path)]}
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {MARK: ["float", repr(value)]}
    if kind is list:
        return [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if kind is tuple:
        return {
            MARK: ["tuple", [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]]
        }
    if kind is dict and all(type(key) is str and key != MARK for key in value):
        return {key: encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if kind in _MAPPINGS.values():
        pairs = [
            [encode(key, f"{path}/key", tensors), encode(item, f"{path}/{key}", tensors)]
            for key, item in value.items()
        ]
        return {MARK: [kind.__name__, pairs]}
    raise TypeError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold exactly"
    )


def decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`.

    Raises:
        KeyError: when a tensor is missing.
        ValueError: when the JSON was not made by :func:`encode`.
    """
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if MARK not in node:
        return {key: decode(item, tensors) for key, item in node.items()}
    kind, payload = node[MARK]
    if kind == "tensor":
        return tensors[payload]
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in payload)
    if kind == "float":
        return float(payload)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](
            {decode(key, tensors): decode(item, tensors) for key, item in payload}
        )
    raise ValueError(f"unknown kind {kind!r}")


def separate(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Detached, contiguous CPU tensors of which no two share memory, as safetensors wants them.

    Values are copied only where they must be, so that a large optimizer state is not doubled.

    Raises:
        TypeError: for a tensor that is not dense, or of a subclass (sharded, quantized).
    """
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors:
        if type(tensor) not in (Tensor, Parameter) or tensor.layout is not torch.strided:
            kind = type(tensor).__qualname__
            raise TypeError(
                f"{name} is a {kind}, not a plain dense tensor: a checkpoint cannot hold it exactly"
            )
        plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone(memory_format=torch.contiguous_format)
        storages.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result
