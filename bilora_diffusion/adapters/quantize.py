"""Frozen weights in 4 bits: NF4 with double quantization, by bitsandbytes (the extra ``quant``).

Source: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), Section 3. Adapters are put
on afterwards and stay in fp32; no weight that is trained is quantized. An adapter is trained on the
rounded weights and used on the base as it came. LoRA's product and DoRA's magnitudes are taken over
as they are, although the norms of rounded rows differ by up to 2 %.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from ..core.errors import UserError
from .access import is_within
from .injection import output_head

# Modules of diffusers' UNets whose weights keep their precision: the two ends of each transformer,
# through which all of its output passes, and the embedding of image size and pooled prompt, on
# which every layer depends. On the miniature they have an eighth of the linear layers' weights and
# make two fifths of the error of the predicted noise. In SDXL they are 1.3 % of the weights: the
# UNet takes 1.86 GB with them in full, 1.82 GB without, and 5.13 GB in bf16.
UNQUANTIZED_MODULES = ("proj_in", "proj_out", "add_embedding")


def quantize(
    model: nn.Module,
    compute_dtype: torch.dtype,
    skip: Collection[str] = UNQUANTIZED_MODULES,
    device: torch.device | None = None,
) -> int:
    """Quantize the weights of the model's linear layers to NF4, in place, one layer after another.

    So there is never a second copy of more than one layer. Each 64 weights, row by row, share a
    scale of 8 bits, and 256 scales one of 32 bits: 4.127 bits a weight. Biases, convolutions,
    norms, embeddings, the output head of a language model, and what Transformers keeps in full
    precision stay as they are (T5 reads the dtype of `wo` to cast that layer's input).

    Args:
        model: a model without adapters; its layers may be on any device.
        compute_dtype: dtype of the weights in each product; float32, bfloat16 or float16.
        skip: names of further layers that stay as they are, or of modules all of whose layers do,
            such as "score", "mid_block" or "to_out.0".
        device: where the weights are quantized and stay (on CUDA that takes a moment); None for
            where they are.

    Returns:
        Number of the layers whose weight is in 4 bits now.

    Raises:
        UserError: bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    paths_of_layer = find_layers(model, skip)
    count = len(paths_of_layer)
    # `popitem` drops the reference to each layer, whose memory is free once it is replaced.
    while paths_of_layer:
        layer, paths = paths_of_layer.popitem()
        quantized = _quantize_layer(bnb, layer, compute_dtype, device)
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized)
    # PEFT reads from the model, not from the layer, which kind of adapter a layer needs. diffusers
    # and Transformers set this attribute when they load a model in 4 bits.
    cast(Any, model).is_loaded_in_4bit = True
    return count


def held_bytes(model: nn.Module, kind: str, skip: Collection[str] = UNQUANTIZED_MODULES) -> int:
    """Bytes of a model's weights and buffers, after its quantization if `kind` is "nf4".

    Raises:
        UserError: bitsandbytes is missing.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    total += sum(buffer.nbytes for buffer in model.buffers())
    if kind == "none":
        return total
    _bitsandbytes()
    for layer in find_layers(model, skip):
        # 4 bits for each weight, 8 for each 64; the scales of the scales are left out.
        quantized_bytes = layer.weight.numel() // 2 + layer.weight.numel() // 64
        total += quantized_bytes - layer.weight.nbytes
    return total


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight with the values that `quantize` would give it, in its dtype.

    Raises:
        UserError: bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    codes, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return bnb.functional.dequantize_4bit(codes, state)


def find_layers(
    model: nn.Module, skip: Collection[str] = UNQUANTIZED_MODULES
) -> dict[nn.Linear, list[str]]:
    """The layers that `quantize` quantizes, each with its paths."""
    paths_of_layer: dict[nn.Linear, list[str]] = {}
    skipped_names = set(skip).union(getattr(model, "_keep_in_fp32_modules", None) or ())
    head = output_head(model)
    # A layer in two places comes twice. A subclass may use its weight in another way:
    # nn.MultiheadAttention reads that of its last layer and never calls it.
    for path, module in model.named_modules(remove_duplicate=False):
        is_skipped = module is head or is_within(path, skipped_names)
        if path and type(module) is nn.Linear and not is_skipped:
            paths_of_layer.setdefault(module, []).append(path)
    return paths_of_layer


def _quantize_layer(
    bnb: Any, layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device | None
) -> nn.Module:
    """A layer of bitsandbytes with the weight and bias of a linear layer."""
    quantized = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype,
        device="meta",  # its first weights are not used
    )
    weight = bnb.nn.Params4bit(
        layer.weight.detach(),
        requires_grad=False,
        module=quantized,
        compress_statistics=True,  # double quantization
        quant_type="nf4",
    )
    # The move to a device quantizes.
    quantized.weight = weight.to(device or layer.weight.device)
    if layer.bias is not None:
        quantized.bias = layer.bias
        quantized.bias.data = layer.bias.detach().to(quantized.weight.device)
    # On CPUs with AVX512-BF16 an evaluation would pack the weights again, for good, in a form
    # through which bitsandbytes passes no gradient, and which fails where 64 does not divide the
    # width.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.train(layer.training)


def _bitsandbytes() -> Any:
    """The module bitsandbytes, which is an optional package."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "4-bit weights need the package bitsandbytes, which is missing; run `pip install "
            '"bitsandbytes>=0.50"` or leave the weights unquantized.'
        ) from error
    return bitsandbytes
