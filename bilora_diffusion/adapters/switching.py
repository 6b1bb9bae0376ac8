"""Switches for which adapters act, and which are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..core.errors import UserError
from ..core.lora_names import INITIAL, PRIMARY
from . import access
from .access import head_parameters, layers


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make exactly these adapters act, in this order, and nothing else trainable; or several.

    Raises:
        UserError: an adapter that no layer has, or that never acts.
    """
    _check(model, names)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(True)
            module.set_adapter(list(names))
        elif isinstance(module, BaseTuner):
            module.active_adapter = list(names)
    for parameter in head_parameters(model, PRIMARY).values():
        parameter.requires_grad_(PRIMARY in names)


def active(model: nn.Module) -> tuple[str, ...]:
    """The adapters that act, in order; empty where adapters are switched off."""
    named_layers = layers(model)
    if not named_layers:
        return ()
    _, first = named_layers[0]
    return () if first.disable_adapters else tuple(first.active_adapters)


@contextmanager
def only(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context exactly these adapters act, for forward passes only; or several.

    Afterwards the order of the adapters and what is trainable are as they were.

    Raises:
        UserError: an adapter that no layer has, or that never acts.
    """
    _check(model, names)
    lora_layers = [layer for _, layer in layers(model)]
    states = [(list(layer.active_adapters), layer.disable_adapters) for layer in lora_layers]
    # PEFT's `set_adapter` makes the adapters' parameters trainable.
    flags: list[tuple[nn.Parameter, bool]] = []
    for layer in lora_layers:
        for parameter in cast(nn.Module, layer).parameters():
            flags.append((parameter, parameter.requires_grad))
    try:
        for layer in lora_layers:
            layer.enable_adapters(True)
            layer.set_adapter(list(names))
        yield
    finally:
        for layer, (order, is_disabled) in zip(lora_layers, states, strict=True):
            layer.set_adapter(order)
            if is_disabled:
                layer.enable_adapters(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def off(lora_layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Within the context no adapter of these layers acts, for forward passes without gradients;
    what is trainable stays as it is.
    """
    # Not by `enable_adapters`, which makes parameters untrainable too.
    switched = [layer for layer in lora_layers if not layer.disable_adapters]
    for layer in switched:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in switched:
            layer._disable_adapters = False


def _check(model: nn.Module, names: Sequence[str]) -> None:
    model_adapters = access.names(model)
    for name in names:
        if name not in model_adapters:
            listing = ", ".join(model_adapters) or "none"
            raise UserError(f'There is no adapter "{name}"; the model has: {listing}.')
    if INITIAL in names:
        raise UserError(
            f'The adapter "{INITIAL}" is what was taken out of the base weights, and would be '
            "counted twice if it acted; leave it out."
        )
