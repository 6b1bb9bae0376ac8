"""Frozen adapters of LoRA files, active with the trained ones and never exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from .access import activate, active, layers
from .injection import put_adapter
from .saving import load_values, peft_parameters


@dataclass(frozen=True)
class FrozenAdapter:
    """The layers of a LoRA file on one model.

    Attributes:
        name: its name on the model, one of `lora_names.FROZEN`.
        tensors: A, B and DoRA's magnitudes by PEFT's keys.
        config: fields of PEFT's `LoraConfig` for these layers.
        strength: factor of the adapter's change of the weights, as in diffusers' `set_adapters`.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    strength: float


def inject_frozen(model: nn.Module, adapter: FrozenAdapter) -> None:
    """Put a frozen adapter on a model, in place; torch's global generator is left alone.

    The first adapter of a model becomes active; later ones become so by `access.activate`. Weights
    on the device "meta" stay there.

    Raises:
        UserError: the model does not have exactly the layers of the adapter, in their shapes.
    """
    acting = active(model) or (adapter.name,)
    # The random first values are replaced.
    with torch.random.fork_rng(devices=[]):
        put_adapter(model, LoraConfig(**adapter.config), adapter.name)
    parameters = peft_parameters(model, adapter.name)
    load_values(parameters, adapter.tensors, f"the adapter {adapter.name}")
    for _, layer in layers(model, adapter.name):
        layer.set_scale(adapter.name, adapter.strength)
    activate(model, acting)
