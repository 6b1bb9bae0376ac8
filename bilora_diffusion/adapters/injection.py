"""Putting adapters on a model and taking them off."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..lora_names import INITIAL, PRIMARY
from .access import check_known, is_quantized, layers, names, whole
from .saving import PEFT_PREFIX
from .switching import activate, active
from .targets import ALL_LINEAR, AdapterSpec, base_of, peft_targets, plain_model, target_layers


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
    to_full_precision(model, name)
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
    for parameter in whole(model, name).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def adopt(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> bool:
    """Take an adapter that the model came with as the adapter `name` of shape `spec`.

    Returns:
        False if the model has no adapter of that name.

    Raises:
        UserError: it has one of another shape, or on other layers, or `spec` asks for first values
            that would replace its own.
    """
    found = dict(layers(model, name))
    if not found:
        return False
    if spec.changes_base:
        raise UserError(
            f'The model\'s adapter "{name}" has its own values, which init "{spec.init}" would '
            'replace; use init "default" or give the model without adapters.'
        )
    config = cast(Any, model).peft_config[name]
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    pairs: dict[str, tuple[Any, Any]] = {
        "rank": (config.r, spec.rank),
        "alpha": (config.lora_alpha, spec.alpha),
        "dropout": (config.lora_dropout, spec.dropout),
        "use_dora": (config.use_dora, spec.use_dora),
        "bias": (config.bias, "none"),
        "modules_to_save": (config.modules_to_save or [], []),
        "target_modules": (
            sorted(found),
            sorted(prefix + key for key in target_layers(model, spec)),
        ),
    }
    for key, (has, wanted) in pairs.items():
        if has != wanted:
            raise UserError(
                f'The model\'s adapter "{name}" has {key} {has} where {wanted} was asked for; '
                "ask for the same or give the model without adapters."
            )
    to_full_precision(model, name)
    return True


def to_full_precision(model: nn.Module, name: str) -> None:
    """Make the adapter's parameters fp32 where they are narrower, by new parameters."""
    cast_adapter_dtype(model, name)


def _reset_magnitudes(model: nn.Module, name: str) -> None:
    """Take DoRA's first magnitudes in fp32.

    PEFT takes them in the base's precision (of 4-bit weights, in that which they compute in), but
    divides by norms in fp32: a bf16 model would start up to 0.4 % beside its base.
    """
    for _, layer in layers(model, name):
        if name in layer.lora_magnitude_vector and base_of(layer).weight.dtype not in (
            torch.float32,
            torch.float64,
        ):
            cast(Any, layer.lora_magnitude_vector[name]).update_layer(
                base_layer=base_of(layer),
                lora_A=layer.lora_A[name].weight,
                lora_B=layer.lora_B[name].weight,
                scaling=layer.scaling[name],
            )


def merge_primary(model: nn.Module) -> nn.Module:
    """Add the primary to the base weights and take every adapter out, in place.

    Returns:
        The plain model: what a `PeftModel` holds, otherwise `model` itself.

    Raises:
        UserError: base weights are quantized; nothing is changed then.
    """
    root = plain_model(model)
    for path, layer in layers(root):
        if is_quantized(layer):
            raise UserError(
                f"The weight of {path} is quantized, and the sum would be rounded to its few bits "
                "once more; save the adapter and merge it into the model without quantization."
            )
    for path, layer in layers(root):
        cast(Any, layer).merge(adapter_names=[PRIMARY])
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(root, "peft_config"):
        del cast(Any, root).peft_config
    if hasattr(root, "_hf_peft_config_loaded"):
        cast(Any, root)._hf_peft_config_loaded = False
    return root


def delete(model: nn.Module, adapter: str) -> None:
    """Take one of several adapters out of `model` (or several).

    Raises:
        UserError: no layer has it, or the base weights would no longer be known without it.
    """
    check_known(model, [adapter])
    if adapter == INITIAL:
        raise UserError(
            f'The adapter "{INITIAL}" says what was taken out of the base weights, without which '
            "the primary can't be exported; keep it, or take all adapters out by merge_primary."
        )
    remaining = [name for name in active(model) if name != adapter]
    activate(model, remaining)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.delete_adapter(adapter)
        if isinstance(configs := module.__dict__.get("peft_config"), dict):
            configs.pop(adapter, None)
