"""Guidance with a lower strength of the adapters in the unconditional prediction.

A LoRA is trained on captions, but it also changes the unconditional prediction. The difference that
guidance amplifies, conditional - unconditional, therefore contains less of the learned change. With
guidance from the base model (strength 0), the adapters act only in the conditional prediction, at
the same cost (Phunyaphibarn et al. 2025, https://arxiv.org/abs/2503.20240, for full fine-tuning;
Zhong et al. 2025, https://arxiv.org/abs/2504.01521, for domains). At a strength between 0 and 1,
they act in the unconditional prediction too, but less (Steering Guidance,
https://arxiv.org/abs/2508.00319):

    with scaled_unconditional(family, denoiser, count=4, strength=0.5):
        images = pipeline(...)  # four
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import FROZEN, LoraLayer
from .families.base import Family, Unconditional


@contextmanager
def scaled_unconditional(
    family: Family, denoiser: nn.Module, count: int, strength: float
) -> Iterator[None]:
    """Lower the strength of the denoiser's adapters in unconditional predictions, within a context.

    At strength 1, or without an active adapter, nothing changes. `Family.unconditional` shows which
    predictions are unconditional.

    Args:
        denoiser: the denoiser with its adapters.
        count: number of images in the pipeline's call; the context is for a single call.
        strength: factor of the adapters' contribution; 0 for the base model.
    """
    acting: list[LoraLayer] = []
    if strength != 1:
        acting = [layer for _, layer in adapters.layers(denoiser) if _is_acting(layer)]
    if not acting:
        yield
    elif family.unconditional is Unconditional.FIRST_ROWS and all(map(_is_plain, acting)):
        # One call of the denoiser, with A x scaled in the unconditional rows.
        with _scaled_first_rows(acting, count, strength):
            yield
    elif family.unconditional is Unconditional.SECOND_CALL:
        forward = _scaled_second_call(denoiser.forward, acting, strength)
        with _replaced_forward(denoiser, forward):
            yield
    else:
        # Two calls instead of one, each with half of the rows.
        is_first = family.unconditional is Unconditional.FIRST_ROWS
        forward = _halves(denoiser.forward, acting, count, strength, is_first=is_first)
        with _replaced_forward(denoiser, forward):
            yield


@contextmanager
def scaled_encoders(family: Family, pipeline: Any, strength: float) -> Iterator[None]:
    """Lower the strength of the adapters of a pipeline's text encoders, within a context."""
    if strength == 1:
        yield
        return
    encoder_layers: list[LoraLayer] = []
    for name in family.encoders:
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            encoder_layers += [layer for _, layer in adapters.layers(encoder)]
    with adapters.scaled(encoder_layers, strength):
        yield


def _acting_names(layer: LoraLayer) -> list[str]:
    """Return the names of a layer's active adapters, without the frozen ones.

    Frozen adapters act in both predictions.
    """
    if layer.disable_adapters:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return [name for name in names if name not in FROZEN]


def _is_acting(layer: LoraLayer) -> bool:
    """Return whether a layer's adapters change its output; with a scaling of 0, only DoRA does."""
    variants = cast(Any, layer).lora_variant
    return any(layer.scaling[name] or name in variants for name in _acting_names(layer))


def _is_plain(layer: LoraLayer) -> bool:
    """Return whether scaling A x of a row scales the trained adapters' whole contribution to it."""
    if layer.merged:  # the adapter is part of the base weight
        return False
    for name in _acting_names(layer):
        # DoRA also scales the base layer's output.
        is_variant = name in cast(Any, layer).lora_variant
        if is_variant or layer.lora_bias[name]:
            return False
    return True


@contextmanager
def _scaled_first_rows(layers: list[LoraLayer], count: int, strength: float) -> Iterator[None]:
    """Scale the adapters' contribution to the first half of the rows, within a context."""

    # hidden = A x, (2 count, ..., rank)
    def scale_first_rows(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        if len(hidden) != 2 * count:
            raise RuntimeError(f"{len(hidden)} rows for {count} guided images, not {2 * count}")
        if strength == 0:
            # B 0 = 0 leaves the base layer's output bitwise unchanged, even if A x overflows.
            return torch.cat([torch.zeros_like(hidden[:count]), hidden[count:]])
        return torch.cat([strength * hidden[:count], hidden[count:]])

    with ExitStack() as stack:
        for layer in layers:
            for name in _acting_names(layer):
                hook = layer.lora_A[name].register_forward_hook(scale_first_rows)
                stack.callback(hook.remove)
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward within a context."""
    # Usually the class defines it, but a module that accelerate offloads has a forward of its own.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _scaled_second_call(
    forward: Callable[..., Any], layers: list[LoraLayer], strength: float
) -> Any:
    """Return a forward that scales adapters in every second call, which is unconditional."""
    calls = itertools.count()

    def alternating(*args: Any, **kwargs: Any) -> Any:
        is_unconditional = next(calls) % 2 == 1
        with adapters.scaled(layers if is_unconditional else [], strength):
            return forward(*args, **kwargs)

    return alternating


def _halves(
    forward: Callable[..., Any],
    layers: list[LoraLayer],
    count: int,
    strength: float,
    *,
    is_first: bool,
) -> Any:
    """Return a forward that splits a batch of 2 ``count`` rows into two calls.

    The adapters are scaled in the call for the unconditional half.

    Args:
        strength: factor of the adapters' contribution in the unconditional call.
        is_first: whether the unconditional half is the first.
    """

    def by_halves(*args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = []
        for half in (slice(0, count), slice(count, 2 * count)):
            is_unconditional = (half.start == 0) == is_first
            half_args, half_kwargs = _rows((args, kwargs), half, 2 * count)
            with adapters.scaled(layers if is_unconditional else [], strength):
                outputs.append(forward(*half_args, **half_kwargs)[0])
        if isinstance(outputs[0], Tensor):
            return (torch.cat(outputs),)
        return ([*outputs[0], *outputs[1]],)  # lists of images

    return by_halves


def _rows(values: Any, rows: slice, count: int) -> Any:
    """Select rows of each tensor and list in the nested arguments of a call.

    Args:
        count: number of rows of the batch; values of another length are returned whole.
    """
    if isinstance(values, dict):
        return {name: _rows(value, rows, count) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_rows(value, rows, count) for value in values)
    is_batch = isinstance(values, list) or (isinstance(values, Tensor) and values.dim() > 0)
    if is_batch and len(values) == count:
        return values[rows]
    return values
