"""Classifier-free guidance whose unconditional prediction is the base model's.

    with unconditional_by_base(family, denoiser, count=4):
        images = pipeline(...)  # four

A LoRA is trained on captions and moves the unconditional prediction too, so that (conditional -
unconditional) has less of what it learned. Here the adapters act in the conditional prediction
only, at the same cost (Phunyaphibarn et al. 2025, https://arxiv.org/abs/2503.20240, for models that
are fine-tuned whole).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import LoraLayer
from .families.base import Family, Unconditional


@contextmanager
def unconditional_by_base(family: Family, denoiser: nn.Module, count: int) -> Iterator[None]:
    """Within the context, one call of a pipeline takes its unconditional predictions from the
    denoiser without its adapters. Where none acts, nothing changes.

    Args:
        denoiser: with its adapters.
        count: images of the call.
    """
    acting = [layer for _, layer in adapters.layers(denoiser) if _is_acting(layer)]
    if not acting:
        yield
    elif family.unconditional is Unconditional.FIRST_ROWS and all(map(_is_plain, acting)):
        with _without_first_rows(acting, count):
            yield
    elif family.unconditional is Unconditional.SECOND_CALL:
        with _replaced_forward(denoiser, _second_call_without(denoiser.forward, acting)):
            yield
    else:
        is_first = family.unconditional is Unconditional.FIRST_ROWS
        forward = _halves(denoiser.forward, acting, count, is_first=is_first)
        with _replaced_forward(denoiser, forward):
            yield


@contextmanager
def encoders_of_base(family: Family, pipeline: Any) -> Iterator[None]:
    """Within the context a pipeline's text encoders embed without their adapters."""
    encoder_layers: list[LoraLayer] = []
    for name in family.encoders:
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            encoder_layers += [layer for _, layer in adapters.layers(encoder)]
    with adapters.off(encoder_layers):
        yield


def _acting_names(layer: LoraLayer) -> list[str]:
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_acting(layer: LoraLayer) -> bool:
    """Test that a layer's adapters add anything: at strength 0 a plain product does not."""
    variants = cast(Any, layer).lora_variant
    return any(layer.scaling[name] or name in variants for name in _acting_names(layer))


def _is_plain(layer: LoraLayer) -> bool:
    """Test that zeros in the place of A x leave what the base layer gives, row by row."""
    if layer.merged:  # into the base weight
        return False
    for name in _acting_names(layer):
        is_variant = name in cast(Any, layer).lora_variant  # DoRA scales the base's output too
        if is_variant or layer.lora_bias[name]:
            return False
    return True


@contextmanager
def _without_first_rows(layers: list[LoraLayer], count: int) -> Iterator[None]:
    """Within the context the adapters act in the last ``count`` of 2 ``count`` rows."""

    def zero_first_rows(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        if len(hidden) != 2 * count:
            raise RuntimeError(f"{len(hidden)} rows for {count} images with guidance")
        # B 0 = 0: what the base layer gives stays as it is, to the bit.
        return torch.cat([torch.zeros_like(hidden[:count]), hidden[count:]])

    with ExitStack() as stack:
        for layer in layers:
            for name in _acting_names(layer):
                hook = layer.lora_A[name].register_forward_hook(zero_first_rows)
                stack.callback(hook.remove)
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context a module has another forward."""
    # Offloading leaves a forward of its own among the module's attributes.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _second_call_without(forward: Callable[..., Any], layers: list[LoraLayer]) -> Any:
    """A forward whose second, fourth, ... calls go without adapters; the first is conditional."""
    calls = itertools.count()

    def alternating(*args: Any, **kwargs: Any) -> Any:
        is_unconditional = next(calls) % 2 == 1
        with adapters.off(layers) if is_unconditional else nullcontext():
            return forward(*args, **kwargs)

    return alternating


def _halves(
    forward: Callable[..., Any], layers: list[LoraLayer], count: int, *, is_first: bool
) -> Any:
    """A forward that makes two calls of a batch of 2 ``count`` rows, that of the unconditional
    half without adapters.

    Args:
        is_first: the unconditional half is the first.
    """

    def by_halves(*args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = []
        for half in (slice(0, count), slice(count, 2 * count)):
            is_unconditional = (half.start == 0) == is_first
            half_args, half_kwargs = _rows((args, kwargs), half, 2 * count)
            with adapters.off(layers) if is_unconditional else nullcontext():
                outputs.append(forward(*half_args, **half_kwargs)[0])
        if isinstance(outputs[0], Tensor):
            return (torch.cat(outputs),)
        return ([*outputs[0], *outputs[1]],)  # lists of images

    return by_halves


def _rows(values: Any, rows: slice, count: int) -> Any:
    """Some rows of all tensors and lists of ``count`` rows among nested values."""
    if isinstance(values, dict):
        return {name: _rows(value, rows, count) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_rows(value, rows, count) for value in values)
    is_batch = isinstance(values, list) or (isinstance(values, Tensor) and values.dim() > 0)
    return values[rows] if is_batch and len(values) == count else values
