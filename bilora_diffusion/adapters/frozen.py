"""Frozen adapters from LoRA files, which are used with the trained ones but never exported."""

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
    """A LoRA file's layers for one model.

    Attributes:
        name: name of the adapter on the model, one of `lora_names.FROZEN`.
        tensors: A, B and DoRA's magnitudes by PEFT key.
        config: fields of PEFT's `LoraConfig` for these layers.
        strength: factor for the adapter's weight change, like the weights in diffusers'
            `set_adapters`.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    strength: float


def inject_frozen(model: nn.Module, adapter: FrozenAdapter) -> None:
    """Add a frozen adapter to a model in place, without changing torch's global generator.

    The new adapter becomes active only if the model has no active adapter; otherwise activate it
    with `access.activate`. Weights on the "meta" device stay there.

    Raises:
        UserError: the adapter's layers or their shapes do not match the model.
    """
    acting = active(model) or (adapter.name,)
    # The random initial values are overwritten below.
    with torch.random.fork_rng(devices=[]):
        put_adapter(model, LoraConfig(**adapter.config), adapter.name)
    parameters = peft_parameters(model, adapter.name)
    load_values(parameters, adapter.tensors, f"the adapter {adapter.name}")
    for _, layer in layers(model, adapter.name):
        layer.set_scale(adapter.name, adapter.strength)
    activate(model, acting)
