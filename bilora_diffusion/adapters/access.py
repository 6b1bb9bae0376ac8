"""Access to a model's adapters: names, layers, factors, parameters, and which ones are active."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.lora_names import ASSISTANT, FROZEN, INITIAL, PRIMARY


class Factors(NamedTuple):
    """The two matrices of one adapter on one layer, as views of the parameters."""

    name: str  # path of the layer
    A: Tensor  # (r, n); for a convolution, n is in_channels * kernel area
    B: Tensor  # (m, r)
    scale: float  # s = alpha / r


def names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters in `model` (or several), in order of first appearance."""
    adapters: dict[str, None] = {}  # an ordered set
    for _, layer in layers(model):
        adapters |= dict.fromkeys(layer.lora_A)
    return tuple(adapters)


def layers(model: nn.Module, adapter: str | None = None) -> list[tuple[str, LoraLayer]]:
    """Return (module path, PEFT layer) for each layer of `model` (or several) with an adapter.

    Args:
        model: model or models to search.
        adapter: name of the adapter that the layers must have; None for any adapter.
    """
    named_layers: list[tuple[str, LoraLayer]] = []
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A):
            # torch.compile wraps a module and adds this part to its path.
            named_layers.append((path.replace("_orig_mod.", ""), module))
    return named_layers


def factors(model: nn.Module, adapter: str) -> list[Factors]:
    """Return A and B of every layer of `model` (or several), in module order."""
    return factors_of(layers(model, adapter), adapter)


def factors_of(named_layers: Sequence[tuple[str, LoraLayer]], adapter: str) -> list[Factors]:
    """Return A and B of these layers, like `factors`, but without walking through the model."""
    layer_factors: list[Factors] = []
    for path, layer in named_layers:
        A, B = weights(layer, adapter)
        scale = float(layer.scaling[adapter])
        layer_factors.append(Factors(path, _as_matrix(A), _as_matrix(B), scale))
    return layer_factors


def group_equal(keys: Iterable[Hashable]) -> list[list[int]]:
    """Group the positions of equal keys, for example to stack layers of the same shape."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def gradients_of(
    named_layers: Sequence[tuple[str, LoraLayer]], adapter: str
) -> list[Factors | None]:
    """Return the gradients of A and B of these layers; None for a layer without gradients."""
    gradients: list[Factors | None] = []
    for path, layer in named_layers:
        A, B = weights(layer, adapter)
        gradient = None
        if A.grad is not None and B.grad is not None:  # otherwise the loss does not use the layer
            scale = float(layer.scaling[adapter])
            gradient = Factors(path, _as_matrix(A.grad), _as_matrix(B.grad), scale)
        gradients.append(gradient)
    return gradients


def weights(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the parameters A and B of one layer.

    This function reads the modules' dictionaries directly: `nn.Module.__getattr__` takes as long as
    a small kernel, and every step calls this function for every layer.
    """
    modules: dict[str, Any] = cast(Any, layer)._modules
    A = modules["lora_A"]._modules[adapter]._parameters["weight"]
    B = modules["lora_B"]._modules[adapter]._parameters["weight"]
    return A, B


def named_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters (A, B, DoRA's magnitude) in `model` (or several) by name.

    A name is the layer's path with a suffix such as ".lora_A.weight", without the adapter's name.
    """
    by_path: dict[str, nn.Parameter] = {}
    for path, layer in layers(model, adapter):
        for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
            holder: nn.ModuleDict = getattr(layer, kind)
            if adapter in holder:
                for leaf, parameter in holder[adapter].named_parameters():
                    by_path[f"{path}.{kind}.{leaf}"] = parameter
    return by_path


def head_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return parameters of `model` (or several) that are trained in full with the adapter, by path.

    They belong to the modules in `AdapterSpec.modules_to_save`, such as a classifier's new head.
    """
    by_id: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        # PEFT stores an adapter's configuration on the model that has the adapter.
        configs = module.__dict__.get("peft_config")
        if not isinstance(configs, dict) or adapter not in configs:
            continue
        whole_modules = configs[adapter].modules_to_save or ()
        for key, parameter in module.named_parameters(path):
            if is_within(key, whole_modules):
                # A PeftModel and the model inside it both have the configuration.
                by_id.setdefault(id(parameter), (key, parameter))
    return dict(by_id.values())


def is_within(path: str, modules: Collection[str]) -> bool:
    """Return whether a path leads to or through a module with one of these names."""
    return any(f".{name}." in f".{path}." for name in modules)


def parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Return the adapter's parameters in `model` (or several), in `named_parameters` order."""
    return list(named_parameters(model, adapter).values())


def is_adapter_weight(name: str) -> bool:
    """Return whether a parameter or buffer with this name belongs to an adapter."""
    return f".{LoraModel.prefix}" in name


def is_quantized(layer: Any) -> bool:
    """Return whether a layer, or the base layer under its adapters, has a quantized weight."""
    if isinstance(layer, LoraLayer):
        layer = cast(Any, layer).get_base_layer()
    weight = getattr(layer, "weight", None)
    has_codes = isinstance(weight, Tensor) and not weight.is_floating_point()
    return has_codes or hasattr(weight, "quant_state")


def base_weight(layer: LoraLayer) -> nn.Parameter:
    """Return the frozen weight under one layer's adapters."""
    return cast(Any, layer).get_base_layer().weight


def rows(layer: LoraLayer, values: Tensor) -> Tensor:
    """Reshape values from the weight's shape to a matrix (m outputs, n inputs).

    The inputs are in the order of `A.flatten(1)`.
    """
    if getattr(layer, "fan_in_fan_out", False):  # Transformers' Conv1D stores (n, m)
        return values.T
    return values.flatten(1)


def from_rows(layer: LoraLayer, values: Tensor) -> Tensor:
    """Reshape a matrix (m outputs, n inputs) to the weight's shape; the inverse of `rows`."""
    if getattr(layer, "fan_in_fan_out", False):
        values = values.T
    return values.reshape(base_weight(layer).shape)


def base_rows(layer: LoraLayer) -> Tensor:
    """Return the base weight as a matrix (m outputs, n inputs) in fp32 or wider.

    The weight must not be quantized. A narrower weight is copied.
    """
    weight = base_weight(layer).detach()
    return rows(layer, weight.to(torch.promote_types(weight.dtype, torch.float32)))


def _as_matrix(weight: Any) -> Tensor:
    """Return a view of a weight (out, ...) as a matrix (out, in)."""
    if weight.dim() == 2:
        return weight.detach()
    # Sorted by stride, since a view can only merge dimensions that are adjacent in memory, and
    # channels_last stores them in another order.
    dimensions = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    return weight.detach().permute(0, *dimensions).view(weight.shape[0], -1)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make exactly these adapters of `model` (or several) active, in this order.

    They become trainable, except those in `FROZEN`. If the primary is among them, the modules that
    are trained in full with it become trainable too. All other parameters are frozen.

    Raises:
        UserError: no layer has one of the adapters, or `INITIAL` is among them.
    """
    _check_names(model, names)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(True)
            module.set_adapter(list(names))
        elif isinstance(module, BaseTuner):
            module.active_adapter = list(names)
    for name in FROZEN:
        for parameter in parameters(model, name):
            parameter.requires_grad_(False)
    for parameter in head_parameters(model, PRIMARY).values():
        parameter.requires_grad_(PRIMARY in names)


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters, in order; () if adapters are disabled."""
    named_layers = layers(model)
    if not named_layers:
        return ()
    # All layers have the same state.
    _, layer = named_layers[0]
    return () if layer.disable_adapters else tuple(layer.active_adapters)


@contextmanager
def only(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Make exactly these adapters of `model` (or several) active within the context.

    Use it for forward passes only. On exit, the previous adapters are active again, and the same
    parameters are trainable as before.

    Raises:
        UserError: no layer has one of the adapters, or `INITIAL` is among them.
    """
    _check_names(model, names)
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


def assisting(model: nn.Module) -> tuple[str, ...]:
    """Return the frozen adapter of `model` (or several) that is active in training; () if none."""
    return (ASSISTANT,) if ASSISTANT in names(model) else ()


@contextmanager
def joined_by(model: nn.Module, frozen: str) -> Iterator[None]:
    """Make a frozen adapter active too within the context, if `model` has this adapter.

    Use it for forward passes only, like `only`.
    """
    if frozen not in names(model):
        yield
        return
    with only(model, (*active(model), frozen)):
        yield


@contextmanager
def off(lora_layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Disable the trained adapters of these layers within the context.

    Active frozen adapters stay active, since they belong to the base model. Use it for forward
    passes without gradients. It does not change which parameters are trainable.
    """
    enabled_layers = [layer for layer in lora_layers if not layer.disable_adapters]
    orders = [layer.active_adapters for layer in enabled_layers]
    # `enable_adapters` and `set_adapter` would also change which parameters are trainable.
    for layer, order in zip(enabled_layers, orders, strict=True):
        layer._active_adapter = [name for name in order if name in FROZEN]
        layer._disable_adapters = not layer._active_adapter
    try:
        yield
    finally:
        for layer, order in zip(enabled_layers, orders, strict=True):
            layer._active_adapter = order
            layer._disable_adapters = False


@contextmanager
def scaled(lora_layers: Sequence[LoraLayer], strength: float) -> Iterator[None]:
    """Scale the weight changes of these layers' trained adapters by `strength` within the context.

    Active frozen adapters are not scaled. At strength 0 the trained adapters are disabled. For DoRA
    this is not the limit of small strengths, since its magnitudes have an effect at any other
    strength.

    Raises:
        UserError: adapters are merged into the base weights, so a strength other than 0 would have
            no effect.
    """
    if strength == 0:
        with off(lora_layers):
            yield
        return
    before = [dict(layer.scaling) for layer in lora_layers]
    if any(layer.merged for layer in lora_layers):
        raise UserError(
            f"merged adapters can't be used at strength {strength:g}: unmerge them first"
            " (`pipeline.unfuse_lora()`)."
        )
    try:
        for layer, scaling in zip(lora_layers, before, strict=True):
            for name, value in scaling.items():
                if name not in FROZEN:
                    layer.scaling[name] = strength * value
        yield
    finally:
        for layer, scaling in zip(lora_layers, before, strict=True):
            layer.scaling.update(scaling)


def _check_names(model: nn.Module, adapters: Sequence[str]) -> None:
    """Check that the model has these adapters and that `INITIAL` is not among them."""
    model_adapters = names(model)
    for name in adapters:
        if name not in model_adapters:
            listing = ", ".join(model_adapters) or "none"
            raise UserError(f'There is no adapter "{name}"; the model has: {listing}.')
    if INITIAL in adapters:
        raise UserError(
            f'The adapter "{INITIAL}" was subtracted from the base weights and would be counted '
            "twice if it were active; leave it out."
        )
