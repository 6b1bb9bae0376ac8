"""Putting adapters on a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import UserError
from ..core.lora_names import PRIMARY
from .access import head_parameters, is_within, layers, names
from .saving import PEFT_PREFIX
from .switching import activate, active
from .targets import ALL_LINEAR, AdapterSpec, base_of, peft_targets, target_layers


def inject(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> None:
    """Add the adapter `name` to every target layer of `model`, in place.

    The base is frozen. The first adapter of a model becomes active, later ones wait for `activate`.
    Random values come from torch's global generator.

    Raises:
        UserError: no layer matches, a matched layer is of a kind that is not supported, or `name`
            exists.
    """
    if name in names(model):
        raise UserError(
            f'The model already has an adapter "{name}"; give the model without adapters.'
        )
    before = active(model) or (name,)
    targets = target_layers(model, spec)
    by_path = spec.target_modules == ALL_LINEAR or bool(spec.modules_to_save)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=cast(int, int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha),
        lora_dropout=spec.dropout,
        # those of `inits/` start as the default and are then replaced
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        use_dora=spec.use_dora,
        target_modules=list(targets) if by_path else peft_targets(spec),
        base_model_name_or_path=getattr(model, "name_or_path", None),
        fan_in_fan_out=any(isinstance(base_of(layer), Conv1D) for layer in targets.values()),
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, name)
        # what add_adapter of diffusers and Transformers sets
        if hasattr(model, "_hf_peft_config_loaded"):
            cast(Any, model)._hf_peft_config_loaded = True
    cast_adapter_dtype(model, name)  # to fp32 where they are narrower, by new parameters
    _reset_magnitudes(model, name)
    _mark_whole(model, spec, name)
    activate(model, before)


def _mark_whole(model: nn.Module, spec: AdapterSpec, name: str) -> None:
    """Note in the adapter's configuration what is trained whole beside it, in fp32.

    PEFT would put a copy beside each such module; there is only one head here, so it is trained
    where it stands, and saved under the keys that PEFT reads.
    """
    if not spec.modules_to_save:
        return
    cast(Any, model).peft_config[name].modules_to_save = list(spec.modules_to_save)
    for parameter in head_parameters(model, name).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def adopt(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> bool:
    """Take an adapter that the model came with as the adapter `name` of shape `spec`.

    Returns:
        False if the model has no adapter of that name.

    Raises:
        UserError: it has one of another shape, or on other layers, or `spec` asks for first values
            that would replace its own.
    """
    adapted = dict(layers(model, name))
    if not adapted:
        return False
    if spec.changes_base:
        raise UserError(
            f'The model\'s adapter "{name}" has its own values, which init "{spec.init}" would '
            'replace; use init "default" or give the model without adapters.'
        )
    config = cast(Any, model).peft_config[name]
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    targets = sorted(prefix + key for key in target_layers(model, spec))
    pairs: dict[str, tuple[Any, Any]] = {
        "rank": (config.r, spec.rank),
        "alpha": (config.lora_alpha, spec.alpha),
        "dropout": (config.lora_dropout, spec.dropout),
        "use_dora": (config.use_dora, spec.use_dora),
        "bias": (config.bias, "none"),
        "modules_to_save": (config.modules_to_save or [], []),
        "target_modules": (sorted(adapted), targets),
    }
    for key, (value, expected) in pairs.items():
        if value != expected:
            raise UserError(
                f'The model\'s adapter "{name}" has {key} {value} where {expected} was asked for; '
                "ask for the same or give the model without adapters."
            )
    cast_adapter_dtype(model, name)
    return True


@contextmanager
def restored(model: nn.Module, spec: AdapterSpec) -> Iterator[None]:
    """Within the context adapters may be put on a model and trained, with whatever `spec` trains or
    changes beside them; then the model is as it came, to the bit.
    """
    changed = [
        p for key, p in model.named_parameters() if is_within(key, spec.modules_to_save or ())
    ]
    if spec.changes_base:
        changed += [cast(Any, layer).weight for layer in target_layers(model, spec).values()]
    before = [(p, p.data.to("cpu", copy=True), p.device) for p in changed]
    try:
        yield
    finally:
        for path, layer in layers(model):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
        cast(Any, model).__dict__.pop("peft_config", None)
        if hasattr(model, "_hf_peft_config_loaded"):
            cast(Any, model)._hf_peft_config_loaded = False
        for parameter, values, device in before:
            parameter.data, parameter.grad = values.to(device), None
            parameter.requires_grad_(False)


def _reset_magnitudes(model: nn.Module, name: str) -> None:
    """Take DoRA's first magnitudes in fp32.

    PEFT takes them in the base's precision (of 4-bit weights, in that which they compute in), but
    divides by norms in fp32: a bf16 model would start up to 0.4 % beside its base.
    """
    for _, layer in layers(model, name):
        base = base_of(layer)
        narrow = base.weight.dtype not in (torch.float32, torch.float64)
        if narrow and name in layer.lora_magnitude_vector:
            cast(Any, layer.lora_magnitude_vector[name]).update_layer(
                base_layer=base,
                lora_A=layer.lora_A[name].weight,
                lora_B=layer.lora_B[name].weight,
                scaling=layer.scaling[name],
            )
