"""LoRA adapters on any `nn.Module`, built on PEFT.

In these functions, `model` is the model that has adapters or gets them: a plain module, a diffusers
or Transformers model, or a `PeftModel`. Where a docstring says "or several", `model` may also be a
module that contains several models, such as `nn.ModuleDict({"unet": ..., "text_encoder": ...})`.
Adapters are in fp32, or in float64 if the base layer is: bf16 would lose small updates.
"""

from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer

from ..core.lora_names import ASSISTANT, AUXILIARY, FROZEN, INITIAL, PRIMARY, SAMPLING
from ..core.values import ALL_LINEAR
from .access import (
    Factors,
    activate,
    active,
    assisting,
    base_rows,
    base_weight,
    factors,
    factors_of,
    from_rows,
    gradients_of,
    group_equal,
    head_parameters,
    is_adapter_weight,
    is_quantized,
    joined_by,
    layers,
    named_parameters,
    off,
    only,
    parameters,
    scaled,
    weights,
)
from .frozen import FrozenAdapter, inject_frozen
from .inits import start_from_initial, subtract_initial
from .injection import (
    CHANGE_BASE,
    AdapterSpec,
    adaptable,
    adopt,
    inject,
    output_head,
    restored,
    target_layers,
)
from .precision import exact_dtype, exact_stack, local_tensor, wide_dtype
from .saving import (
    lora_config,
    peft_key,
    peft_path,
    portable,
    portable_state_dict,
    pretrained_content,
    save_pretrained,
    state_dict,
    twice_the_rank,
    write_pretrained,
)
