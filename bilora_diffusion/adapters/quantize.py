"""Quantization of frozen weights to 4 bits: NF4 with double quantization by bitsandbytes.

bitsandbytes is in the extra ``quant``. Source: QLoRA (Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314), Section 3. Adapters are added after quantization and stay in
fp32; no trained weight is quantized. An adapter is trained on the quantized weights but used on the
original base. LoRA's product and DoRA's magnitudes are exported unchanged, although the row norms
of the quantized weights differ by up to 2 %.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from ..core.errors import UserError
from .access import is_within
from .injection import output_head

# Modules of diffusers' UNets that are not quantized: the input and output projections of each
# transformer, which all of its output passes through, and the embedding of image size and pooled
# prompt, which every layer depends on. In the miniature they have one eighth of the linear layers'
# weights but cause two fifths of the error in the predicted noise. In SDXL they have 1.3 % of the
# weights: the UNet takes 1.86 GB if they keep their precision, 1.82 GB if they are quantized too,
# and 5.13 GB in bf16.
UNQUANTIZED_MODULES = ("proj_in", "proj_out", "add_embedding")


def quantize(
    model: nn.Module,
    compute_dtype: torch.dtype,
    skip: Collection[str] = UNQUANTIZED_MODULES,
    device: torch.device | None = None,
) -> int:
    """Quantize the weights of the model's linear layers to NF4 in place, one layer at a time.

    At most one layer is in memory twice. Each block of 64 weights, row by row, shares an 8-bit
    scale, and each block of 256 scales shares a 32-bit scale: 4.127 bits per weight. Biases,
    convolutions, norms, embeddings, the output head of a language model, and the modules that
    Transformers keeps in fp32 are not quantized (T5 reads the dtype of `wo` to cast that layer's
    input).

    Args:
        model: model without adapters; its layers may be on any device.
        compute_dtype: dtype of the weights in each product: float32, bfloat16 or float16.
        skip: names of further layers, or of modules whose layers are all skipped, such as "score",
            "mid_block" or "to_out.0".
        device: device on which the weights are quantized (a matter of seconds on CUDA) and then
            stay; None for their current device.

    Returns:
        Number of layers that were quantized.

    Raises:
        UserError: bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    paths_of_layer = find_layers(model, skip)
    count = len(paths_of_layer)
    # `popitem` drops the reference to each layer, so its memory is freed once it is replaced.
    while paths_of_layer:
        layer, paths = paths_of_layer.popitem()
        quantized = _quantize_layer(bnb, layer, compute_dtype, device)
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized)
    # PEFT chooses a layer's kind of adapter by this attribute of the model. diffusers and
    # Transformers set it when they load a model in 4 bits.
    cast(Any, model).is_loaded_in_4bit = True
    return count


def held_bytes(model: nn.Module, kind: str, skip: Collection[str] = UNQUANTIZED_MODULES) -> int:
    """Return the bytes of a model's weights and buffers, as if quantized if `kind` is "nf4".

    Raises:
        UserError: bitsandbytes is missing.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    total += sum(buffer.nbytes for buffer in model.buffers())
    if kind == "none":
        return total
    _bitsandbytes()
    for layer in find_layers(model, skip):
        # 4 bits per weight and 8 bits per 64 weights; the scales of the scales are ignored.
        quantized_bytes = layer.weight.numel() // 2 + layer.weight.numel() // 64
        total += quantized_bytes - layer.weight.nbytes
    return total


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight to the values that `quantize` would give it, in its own dtype.

    Raises:
        UserError: bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    codes, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return bnb.functional.dequantize_4bit(codes, state)


def find_layers(
    model: nn.Module, skip: Collection[str] = UNQUANTIZED_MODULES
) -> dict[nn.Linear, list[str]]:
    """Return the layers that `quantize` quantizes, each with its paths."""
    paths_of_layer: dict[nn.Linear, list[str]] = {}
    skipped_names = set(skip).union(getattr(model, "_keep_in_fp32_modules", None) or ())
    head = output_head(model)
    # A layer that is used in two places is listed twice. Subclasses of nn.Linear are skipped, since
    # their weight may be used in another way: nn.MultiheadAttention reads the weight of its output
    # layer and never calls this layer.
    for path, module in model.named_modules(remove_duplicate=False):
        is_skipped = module is head or is_within(path, skipped_names)
        if path and type(module) is nn.Linear and not is_skipped:
            paths_of_layer.setdefault(module, []).append(path)
    return paths_of_layer


def _quantize_layer(
    bnb: Any, layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device | None
) -> nn.Module:
    """Create a bitsandbytes layer with the weight and bias of a linear layer."""
    quantized = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype,
        device="meta",  # its initial weights are not used
    )
    weight = bnb.nn.Params4bit(
        layer.weight.detach(),
        requires_grad=False,
        module=quantized,
        compress_statistics=True,  # double quantization
        quant_type="nf4",
    )
    # Moving the weight to a device quantizes it.
    quantized.weight = weight.to(device or layer.weight.device)
    if layer.bias is not None:
        quantized.bias = layer.bias
        quantized.bias.data = layer.bias.detach().to(quantized.weight.device)
    # On CPUs with AVX512-BF16, an evaluation would repack the weights permanently. bitsandbytes
    # passes no gradient through the new format, and fails if the width is not a multiple of 64.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.train(layer.training)


def _bitsandbytes() -> Any:
    """Import and return bitsandbytes, which is an optional package."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "4-bit weights need the package bitsandbytes, which is missing; run `pip install "
            '"bitsandbytes>=0.50"` or leave the weights unquantized.'
        ) from error
    return bitsandbytes
