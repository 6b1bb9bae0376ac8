"""Frozen weights in 4 bits: NF4 with double quantization, by bitsandbytes (the extra ``quant``).

Source: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), Section 3. Adapters are put
on afterwards and stay in fp32; nothing here touches a weight that is trained. What they add is made
for the rounded weights, and is used on the base as it came: LoRA's product as it is, DoRA's
magnitudes although the norms of rounded rows differ by up to 2 %.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from ..core.errors import UserError
from .access import is_within
from .injection import output_head

# The two ends of a diffusers UNet's transformers, through which all that these compute passes, and
# the embedding of image size and pooled prompt, on which every layer depends: on the miniature they
# make two fifths of the error of the predicted noise with an eighth of the linear layers' weights.
# In SDXL they are 1.3 % of these: the UNet takes 1.86 GB with them, 1.82 without, and 5.13 in bf16.
UNQUANTIZED_MODULES = ("proj_in", "proj_out", "add_embedding")


def quantize(
    model: nn.Module,
    compute_dtype: torch.dtype,
    skip: Collection[str] = UNQUANTIZED_MODULES,
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
    places = _places(model, skip)
    count = len(places)
    while places:  # nothing may hold on to a layer that has been replaced
        layer, paths = places.popitem()
        quantized = _four_bit(bnb, layer, compute_dtype, device)
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized)
    # PEFT asks the model, not the layer, which kind of adapter a layer needs; diffusers and
    # Transformers set the same when they load a model in 4 bits.
    cast(Any, model).is_loaded_in_4bit = True
    return count


def held_bytes(model: nn.Module, kind: str, skip: Collection[str] = UNQUANTIZED_MODULES) -> int:
    """Bytes of a model's weights and buffers, once it is quantized if `kind` is "nf4".

    Raises:
        UserError: bitsandbytes is missing.
    """
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if kind == "none":
        return total
    _bitsandbytes()
    weights = [layer.weight for layer in _places(model, skip)]
    codes_and_scales = sum(w.numel() // 2 + w.numel() // 64 for w in weights)
    return total - sum(w.nbytes for w in weights) + codes_and_scales


def _places(model: nn.Module, skip: Collection[str]) -> dict[nn.Linear, list[str]]:
    """The layers that are quantized, each with its paths."""
    places: dict[nn.Linear, list[str]] = {}
    names = {*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    head = output_head(model)
    # A layer that stands in two places comes twice. Of a subclass one can't know how its weight is
    # used: nn.MultiheadAttention reads that of its last layer and never calls it.
    for path, module in model.named_modules(remove_duplicate=False):
        spared = module is head or is_within(path, names)
        if path and type(module) is nn.Linear and not spared:
            places.setdefault(module, []).append(path)
    return places


def _four_bit(
    bnb: Any, layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device | None
) -> nn.Module:
    quantized = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype,
        device="meta",  # its own weights would be thrown away
    )
    storage = {"compress_statistics": True, "quant_type": "nf4"}
    weight = bnb.nn.Params4bit(
        layer.weight.detach(), requires_grad=False, module=quantized, **storage
    )
    quantized.weight = weight.to(device or layer.weight.device)
    if layer.bias is not None:
        quantized.bias = layer.bias
        quantized.bias.data = layer.bias.detach().to(quantized.weight.device)
    # On CPUs with AVX512-BF16 an evaluation would pack the weights anew, for good, in a form
    # through which bitsandbytes passes no gradient, and that fails where 64 does not
    # divide the width.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.train(layer.training)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # optional
    except ImportError as error:
        raise UserError(
            "4-bit weights need the package bitsandbytes, which is missing; run `pip install "
            '"bitsandbytes>=0.50"` or leave the weights unquantized.'
        ) from error
    return bitsandbytes
