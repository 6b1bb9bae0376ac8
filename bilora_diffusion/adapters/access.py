"""What adapters a model holds (names, layers, factors, parameters), and which of them act."""

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
    A: Tensor  # (r, n); a convolution's n is in_channels * kernel area
    B: Tensor  # (m, r)
    scale: float  # s = alpha / r


def names(model: nn.Module) -> tuple[str, ...]:
    """Every adapter in `model` (or several), in order of first appearance."""
    adapters: dict[str, None] = {}  # an ordered set
    for _, layer in layers(model):
        adapters |= dict.fromkeys(layer.lora_A)
    return tuple(adapters)


def layers(model: nn.Module, adapter: str | None = None) -> list[tuple[str, LoraLayer]]:
    """(module path, PEFT layer) of each layer of `model` (or several) with an adapter.

    Args:
        model: the model.
        adapter: the adapter that the layers must have; None for any.
    """
    named_layers: list[tuple[str, LoraLayer]] = []
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A):
            # torch.compile puts a module of this name around another one.
            named_layers.append((path.replace("_orig_mod.", ""), module))
    return named_layers


def factors(model: nn.Module, adapter: str) -> list[Factors]:
    """A and B of every layer of `model` (or several), in the order of the modules."""
    return factors_of(layers(model, adapter), adapter)


def factors_of(named_layers: Sequence[tuple[str, LoraLayer]], adapter: str) -> list[Factors]:
    """A and B of these layers, as `factors`, but without a walk through the whole model."""
    layer_factors: list[Factors] = []
    for path, layer in named_layers:
        A, B = weights(layer, adapter)
        scale = float(layer.scaling[adapter])
        layer_factors.append(Factors(path, _as_matrix(A), _as_matrix(B), scale))
    return layer_factors


def group_equal(keys: Iterable[Hashable]) -> list[list[int]]:
    """Group the positions of equal keys. Layers of one shape, for example, are computed at once."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def gradients_of(
    named_layers: Sequence[tuple[str, LoraLayer]], adapter: str
) -> list[Factors | None]:
    """The gradients of A and B of these layers, as `factors_of`; None for a layer that has none."""
    gradients: list[Factors | None] = []
    for path, layer in named_layers:
        A, B = weights(layer, adapter)
        gradient = None
        if A.grad is not None and B.grad is not None:  # else the loss does not reach the layer
            scale = float(layer.scaling[adapter])
            gradient = Factors(path, _as_matrix(A.grad), _as_matrix(B.grad), scale)
        gradients.append(gradient)
    return gradients


def weights(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters A and B of one layer.

    They are looked up in the dictionaries that modules keep them in: `nn.Module.__getattr__` takes
    as long as a small kernel, and every step does this for every layer.
    """
    modules: dict[str, Any] = cast(Any, layer)._modules
    A = modules["lora_A"]._modules[adapter]._parameters["weight"]
    B = modules["lora_B"]._modules[adapter]._parameters["weight"]
    return A, B


def named_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters (A, B, DoRA's magnitude) of `model` (or several).

    A key is the path of the layer and ".lora_A.weight" or the like, without the adapter's name.
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
    """Parameters of `model` (or several) that are trained whole with the adapter, by path.

    They are those of `AdapterSpec.modules_to_save`, such as a classifier's new head.
    """
    by_id: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        # PEFT stores an adapter's configuration on the model that it was injected into.
        configs = module.__dict__.get("peft_config")
        if not isinstance(configs, dict) or adapter not in configs:
            continue
        whole_modules = configs[adapter].modules_to_save or ()
        for key, parameter in module.named_parameters(path):
            if is_within(key, whole_modules):
                # A PeftModel and the model in it both have the configuration.
                by_id.setdefault(id(parameter), (key, parameter))
    return dict(by_id.values())


def is_within(path: str, modules: Collection[str]) -> bool:
    """Test that a module on a path, or its end, has one of these names."""
    return any(f".{name}." in f".{path}." for name in modules)


def parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The values of `named_parameters`."""
    return list(named_parameters(model, adapter).values())


def is_adapter_weight(name: str) -> bool:
    """Test that a name of a parameter or buffer is that of an adapter's."""
    return f".{LoraModel.prefix}" in name


def is_quantized(layer: Any) -> bool:
    """Test that a layer, or the layer under its adapters, holds its weight in 4 bits."""
    if isinstance(layer, LoraLayer):
        layer = cast(Any, layer).get_base_layer()
    weight = getattr(layer, "weight", None)
    has_codes = isinstance(weight, Tensor) and not weight.is_floating_point()
    return has_codes or hasattr(weight, "quant_state")


def base_weight(layer: LoraLayer) -> nn.Parameter:
    """The frozen weight under the adapters of one layer."""
    return cast(Any, layer).get_base_layer().weight


def rows(layer: LoraLayer, values: Tensor) -> Tensor:
    """Values in the shape of the weight as a matrix (m outputs, n inputs).

    n is in the order of `A.flatten(1)`.
    """
    if getattr(layer, "fan_in_fan_out", False):  # Transformers' Conv1D has (n, m)
        return values.T
    return values.flatten(1)


def from_rows(layer: LoraLayer, values: Tensor) -> Tensor:
    """The reverse of `rows`: (m outputs, n inputs) in the shape of the weight."""
    if getattr(layer, "fan_in_fan_out", False):
        values = values.T
    return values.reshape(base_weight(layer).shape)


def base_rows(layer: LoraLayer) -> Tensor:
    """The base weight, not quantized, as `rows`, in fp32 or wider; a copy where it is narrower."""
    weight = base_weight(layer).detach()
    return rows(layer, weight.to(torch.promote_types(weight.dtype, torch.float32)))


def _as_matrix(weight: Any) -> Tensor:
    """A view of a weight (out, ...) as a matrix (out, in)."""
    if weight.dim() == 2:
        return weight.detach()
    # By their strides, since only dimensions that follow each other in memory can be joined in a
    # view: those of channels_last have another order.
    dimensions = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    return weight.detach().permute(0, *dimensions).view(weight.shape[0], -1)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make exactly these adapters of `model` (or several) act, in this order.

    They become trainable but for those of `FROZEN`, with the modules that are trained whole with
    the primary, and all else is frozen.

    Raises:
        UserError: an adapter that no layer has, or that never acts.
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
    """The adapters that act, in order; empty where adapters are switched off."""
    named_layers = layers(model)
    if not named_layers:
        return ()
    # All layers have the same state.
    _, layer = named_layers[0]
    return () if layer.disable_adapters else tuple(layer.active_adapters)


@contextmanager
def only(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Make exactly these adapters of `model` (or several) act within the context.

    It is for forward passes alone. Afterwards the order of the adapters and what is trainable are
    as before.

    Raises:
        UserError: an adapter that no layer has, or that never acts.
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
    """The frozen adapter of `model` (or several) that acts in training; () without one."""
    return (ASSISTANT,) if ASSISTANT in names(model) else ()


@contextmanager
def joined_by(model: nn.Module, frozen: str) -> Iterator[None]:
    """Let a frozen adapter act too within the context, if `model` has it.

    It is for forward passes alone, as `only` is.
    """
    if frozen not in names(model):
        yield
        return
    with only(model, (*active(model), frozen)):
        yield


@contextmanager
def off(lora_layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Let no trained adapter of these layers act within the context.

    Frozen adapters that act go on acting: they belong to the base model. It is for forward passes
    without gradients. What is trainable stays as it is.
    """
    enabled_layers = [layer for layer in lora_layers if not layer.disable_adapters]
    orders = [layer.active_adapters for layer in enabled_layers]
    # Not by `enable_adapters` and `set_adapter`, which change what is trainable too.
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
    """Multiply the change of all trained adapters of these layers by a strength within the context.

    Frozen adapters that act go on acting, as in `off`. At strength 0 the trained ones do not act at
    all, which for DoRA is not the limit of small strengths: its magnitudes act at any other
    strength.

    Raises:
        UserError: adapters that are merged into the base weights, where a strength has no effect.
    """
    if strength == 0:
        with off(lora_layers):
            yield
        return
    before = [dict(layer.scaling) for layer in lora_layers]
    if any(layer.merged for layer in lora_layers):
        raise UserError(
            f"adapters that are merged into the base weights can't act at strength {strength:g}:"
            " unmerge them first (`pipeline.unfuse_lora()`)."
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
    """Refuse an adapter that no layer of the model has, or that never acts."""
    model_adapters = names(model)
    for name in adapters:
        if name not in model_adapters:
            listing = ", ".join(model_adapters) or "none"
            raise UserError(f'There is no adapter "{name}"; the model has: {listing}.')
    if INITIAL in adapters:
        raise UserError(
            f'The adapter "{INITIAL}" is what was taken out of the base weights, and would be '
            "counted twice if it acted; leave it out."
        )
