"""Frozen weights in 4 bits: NF4 with double quantization, by bitsandbytes (the extra ``quant``).

Source: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), Section 3. Adapters are put
on afterwards and stay in fp32; nothing here touches a weight that is trained. What they add is made
for the rounded weights, and is used on the base as it came: LoRA's product as it is, DoRA's
magnitudes although the norms of rounded rows differ by up to 2 %.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from .access import within
from .weightless import empty, is_weightless, let_move

# The two ends of a diffusers UNet's transformers, through which all that these compute passes, and
# the embedding of image size and pooled prompt, on which every layer depends: on the miniature they
# make two fifths of the error of the predicted noise with an eighth of the linear layers' weights.
# In SDXL they are 1.3 % of these: the UNet takes 1.86 GB with them, 1.82 without, and 5.13 in bf16.
KEPT = ("proj_in", "proj_out", "add_embedding")


def quantize(
    model: nn.Module,
    compute_dtype: torch.dtype,
    skip: Collection[str] = KEPT,
    device: torch.device | None = None,
) -> int:
    """Hold the weights of the model's linear layers in NF4, in place, one layer after another.

    So at no time is there a second copy of more than one layer. Each 64 weights, row by row, share
    a scale of 8 bits, and 256 scales one of 32 bits: 4.127 bits a weight. Left as they are: biases,
    convolutions, norms, embeddings, the output head of a language model, and what Transformers
    keeps in full precision (T5 reads the dtype of `wo` to cast that layer's input).

    Args:
        model: without adapters; its layers may be on any device.
        compute_dtype: what weights are turned into for each product; float32, bfloat16 or float16.
        skip: names of more layers, or of modules all of whose layers, are left as they are, such as
            "score", "mid_block" or "to_out.0".
        device: where the weights are quantized and stay (on CUDA that takes a moment); None is
            where they are.

    Returns:
        How many layers hold their weight in 4 bits now.

    Raises:
        UserError: bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    places: dict[nn.Linear, list[str]] = {}
    for path, layer in _linear_layers(model, skip):
        places.setdefault(layer, []).append(path)
    count = len(places)
    while places:  # nothing may hold on to a layer that has been replaced
        layer, paths = places.popitem()
        made = _four_bit(bnb, layer, compute_dtype, device)
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    # PEFT asks the model, not the layer, which kind of adapter a layer needs; diffusers and
    # Transformers set the same when they load a model in 4 bits.
    cast(Any, model).is_loaded_in_4bit = True
    return count


def _linear_layers(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, nn.Linear]]:
    names = {*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    # A layer that stands in two places comes twice. Of a subclass one can't know how its weight is
    # used: nn.MultiheadAttention reads that of its last layer and never calls it.
    for path, module in model.named_modules(remove_duplicate=False):
        spared = module is head or within(path, names)
        if path and type(module) is nn.Linear and not spared:
            yield path, module


def _four_bit(
    bnb: Any, layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device | None
) -> nn.Module:
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype,
        device="meta",  # its own weights would be thrown away
    )
    held = {"compress_statistics": True, "quant_type": "nf4"}
    if is_weightless(layer.weight):
        made.weight = _without_memory(bnb, layer.weight.to(device or layer.weight.device), held)
        let_move(made)
    else:
        weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, module=made, **held)
        made.weight = weight.to(device or layer.weight.device)
    if layer.bias is not None:
        made.bias = layer.bias
        made.bias.data = layer.bias.detach().to(made.weight.device)
    # On CPUs with AVX512-BF16 an evaluation would pack the weights anew, for good, in a form
    # through which bitsandbytes passes no gradient, and that fails where 64 does not
    # divide the width.
    made.support_avx512bf16_for_cpu = False
    return made.train(layer.training)


def _without_memory(bnb: Any, weight: Tensor, held: dict[str, Any]) -> nn.Parameter:
    """What stands for the 4-bit form of a weight that takes no memory, of which bitsandbytes' class
    can't be made.
    """
    packed, state = bnb.functional.quantize_4bit(weight.detach(), **held)
    made: Any = nn.Parameter(empty(packed.shape, packed.dtype, packed.device), requires_grad=False)
    made.quant_state, made.bnb_quantized = state, True
    vars(made).update(held)
    return made


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # optional
    except ImportError as error:
        raise UserError(
            "4-bit weights need the package bitsandbytes, which is missing; run `pip install "
            '"bitsandbytes>=0.50"` or leave the weights unquantized.'
        ) from error
    return bitsandbytes
