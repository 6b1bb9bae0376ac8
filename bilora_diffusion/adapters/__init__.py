"""LoRA adapters on any `nn.Module`, through PEFT: the only place that calls it.

`model` in these functions is a model that was injected (a plain module, a diffusers or Transformers
model, a `PeftModel`). Where they say "or several" it may also be a module that holds some, such as
`nn.ModuleDict({"unet": ..., "text_encoder": ...})`. Adapters live in fp32, or in float64 where the
base layer does: bf16 would lose small updates.
"""

from peft.tuners.lora import LoraLayer

from .access import (
    AUXILIARY,
    PRIMARY,
    Factors,
    base_weight,
    factors,
    factors_of,
    layers,
    named_parameters,
    names,
    output_rows,
    parameters,
)
from .injection import adopt, delete, inject, merge_primary, to_full_precision
from .saving import load_state_dict, lora_config, save_pretrained, state_dict, weight_delta
from .switching import activate, active, only
from .targets import ALL_LINEAR, INITS, AdapterSpec, target_layers

__all__ = [
    "ALL_LINEAR",
    "AUXILIARY",
    "INITS",
    "PRIMARY",
    "AdapterSpec",
    "Factors",
    "LoraLayer",
    "activate",
    "active",
    "adopt",
    "base_weight",
    "delete",
    "factors",
    "factors_of",
    "inject",
    "layers",
    "load_state_dict",
    "lora_config",
    "merge_primary",
    "named_parameters",
    "names",
    "only",
    "output_rows",
    "parameters",
    "save_pretrained",
    "state_dict",
    "target_layers",
    "to_full_precision",
    "weight_delta",
]
