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
from .access import layers, whole


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
    for parameter in whole(model, PRIMARY).values():
        parameter.requires_grad_(PRIMARY in names)


def active(model: nn.Module) -> tuple[str, ...]:
    """The adapters that act, in order; empty where adapters are switched off."""
    found = layers(model)
    return tuple(found[0][1].active_adapters) if found and not found[0][1].disable_adapters else ()


@contextmanager
def only(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context exactly these adapters act, for forward passes only; or several.

    Afterwards the order of the adapters and what is trainable are as they were.

    Raises:
        UserError: an adapter that no layer has, or that never acts.
    """
    _check(model, names)
    before = [
        (layer, list(layer.active_adapters), layer.disable_adapters) for _, layer in layers(model)
    ]
    flags = [
        (p, p.requires_grad) for layer, _, _ in before for p in cast(nn.Module, layer).parameters()
    ]
    try:
        for layer, _, _ in before:
            layer.enable_adapters(True)
            layer.set_adapter(list(names))
        yield
    finally:
        for layer, order, disabled in before:
            layer.set_adapter(order)
            if disabled:
                layer.enable_adapters(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def off(found: Sequence[LoraLayer]) -> Iterator[None]:
    """Within the context no adapter of these layers acts, for forward passes without gradients;
    what is trainable stays as it is.
    """
    switched = [layer for layer in found if not layer.disable_adapters]
    for layer in switched:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in switched:
            layer._disable_adapters = False


def _check(model: nn.Module, wanted: Sequence[str]) -> None:
    known = access.names(model)
    if odd := [name for name in wanted if name not in known]:
        has = ", ".join(known) or "none"
        raise UserError(f'There is no adapter "{odd[0]}"; the model has: {has}.')
    if INITIAL in wanted:
        raise UserError(
            f'The adapter "{INITIAL}" is what was taken out of the base weights, and would be '
            "counted twice if it acted; leave it out."
        )
