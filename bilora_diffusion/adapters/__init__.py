"""LoRA adapters on any `nn.Module`, through PEFT: the only place that calls it.

`model` in these functions is a model that was injected (a plain module, a diffusers or Transformers
model, a `PeftModel`). Where they say "or several" it may also be a module that holds some, such as
`nn.ModuleDict({"unet": ..., "text_encoder": ...})`. Adapters live in fp32, or in float64 where the
base layer does: bf16 would lose small updates.
"""

from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer

from ..core.choices import ALL_LINEAR, INITS
from ..core.lora_names import AUXILIARY, INITIAL, PRIMARY
from .access import (
    Factors,
    alike,
    base_rows,
    base_weight,
    factors,
    factors_of,
    from_rows,
    gradients_of,
    head_parameters,
    is_quantized,
    layers,
    named_parameters,
    names,
    parameters,
    rows,
    weights,
)
from .initial import (
    keep_initial,
    set_initial,
    start_from_initial,
    subtract_initial,
)
from .injection import adopt, inject, restored
from .saving import (
    lora_config,
    peft_key,
    peft_path,
    portable,
    portable_state_dict,
    pretrained,
    save_pretrained,
    state_dict,
    twice_the_rank,
    write_pretrained,
)
from .switching import activate, active, off, only
from .targets import CHANGE_BASE, AdapterSpec, adaptable, output_head, target_layers
