"""The tensors of a LoRA file by its header, and what must hold of them before any use."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .peft_config import PeftConfig

DOWN = ("lora_A", "lora_embedding_A", "lora_down", "lora.down", "lora_linear_layer.down")
UP = ("lora_B", "lora_embedding_B", "lora_up", "lora.up", "lora_linear_layer.up")
MAGNITUDE = ("lora_magnitude_vector", "dora_scale")
ROLES = (
    dict.fromkeys(DOWN, "A") | dict.fromkeys(UP, "B") | dict.fromkeys(MAGNITUDE, "magnitude")
) | {"alpha": "alpha"}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class Entry(NamedTuple):
    """A tensor of an adapter."""

    key: str
    model: str
    name: str  # of the layer in the file, by which PEFT's patterns know it
    layer: str  # spelt alike for all formats
    kind: str
    adapter: str | None
    shape: tuple[int, ...]
    dtype: str
    alpha: float | None

    @property
    def is_bias(self) -> bool:
        """Whether it is a factor's bias, which PEFT alone knows."""
        return self.key.endswith(".bias")


def check_tensors(path: Path, entries: Sequence[Entry]) -> None:
    """Refuse tensors that are no part of any LoRA.

    Raises:
        UserError: a factor is not of floats or has a size of 0, or an alpha has several values.
    """
    for entry in entries:
        if entry.kind == "alpha":
            if entry.alpha is None:
                raise UserError(
                    f"{path} has {math.prod(entry.shape)} values as {entry.key}, which is one"
                    " number; give another file."
                )
            continue
        if entry.dtype not in _FLOATS:
            raise UserError(
                f"{path} has {entry.key} as {entry.dtype}, and LoRA is made of floats; give a file"
                f" in one of {', '.join(_FLOATS)}."
            )
        needed = 2 if ROLES[entry.kind] in "AB" and not entry.is_bias else 1
        if len(entry.shape) < needed or 0 in entry.shape:
            raise UserError(
                f"{path} has {entry.key} of the shape {list(entry.shape)}, which is no part of a"
                " LoRA; give another file."
            )


def check_layers(path: Path, entries: Sequence[Entry], config: Mapping[str, PeftConfig]) -> None:
    """Refuse layers whose tensors do not belong together, where each has one adapter.

    Raises:
        UserError: a factor is missing or there twice, shapes do not fit each other or the
            configuration, or DoRA is on some layers of a model only.
    """
    models: dict[str, dict[str, dict[str, Entry]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        if entry.is_bias:
            continue
        layer = models[entry.model][entry.layer]
        if (other := layer.setdefault(ROLES[entry.kind], entry)) is not entry:
            raise UserError(f"{path} has both {other.key} and {entry.key}; leave one of them out.")
    for model, layers in models.items():
        for layer in layers.values():
            _check_layer(path, layer, config.get(model))
        _check_dora(path, list(layers.values()), config.get(model))


def _check_layer(path: Path, layer: Mapping[str, Entry], config: PeftConfig | None) -> None:
    first = next(iter(layer.values()))
    if missing := {"A", "B"} - layer.keys():
        raise UserError(
            f"{path} has {first.key} without the factor {min(missing)} of its layer; download it"
            " again."
        )
    A, B = layer["A"], layer["B"]
    rank, width = A.shape[0], B.shape[0]
    if len(A.shape) != len(B.shape) or B.shape[1:] != (rank, *(1 for _ in B.shape[2:])):
        raise UserError(
            f"{path} has {A.key} of the shape {list(A.shape)} and {B.key} of {list(B.shape)}, which"
            " do not fit; download it again."
        )
    if config is not None and config.rank(A.name) != rank:
        raise UserError(
            f"{path} has {A.key} of rank {rank}, for which its configuration says"
            f" {config.rank(A.name)}; put its own configuration there."
        )
    magnitude = layer.get("magnitude")
    if magnitude is not None and "embedding" not in A.kind:
        across = len(magnitude.shape) == 2 and magnitude.shape[1] == width > 1
        if math.prod(magnitude.shape) != width or across:
            raise UserError(
                f"{path} has DoRA's scale {magnitude.key} along the inputs, which diffusers and"
                " PEFT can't do; train it with scales along the outputs."
            )


def _check_dora(
    path: Path, layers: Sequence[Mapping[str, Entry]], config: PeftConfig | None
) -> None:
    plain = [layer["A"].key for layer in layers if "magnitude" not in layer]
    if plain and len(plain) < len(layers):
        raise UserError(
            f"{path} has DoRA's magnitudes for {len(layers) - len(plain)} layers and none for"
            f" {len(plain)}, such as {plain[0]}, which no library can load; train all layers alike."
        )
    if config is not None and config.use_dora == bool(plain):
        said = "DoRA" if config.use_dora else "no DoRA"
        raise UserError(
            f"{path} has {'no ' if plain else ''}magnitudes of DoRA, and its configuration says"
            f" {said}; put its own configuration there."
        )
