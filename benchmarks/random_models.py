"""Real architectures with random weights, made in seconds: what the benchmarks run on.

A model is built without memory (on PyTorch's ``meta`` device), given memory in its final precision,
and filled. Matrices and kernels get normal values of standard deviation 1/sqrt(fan-in), so that
activations stay of order one and finite in bfloat16 through all 70 transformer blocks;
normalization weights are 1, biases 0, embeddings have deviation 0.02.
Sizes of SDXL base 1.0 and Llama 2 are those of their published ``config.json`` files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

Model = TypeVar("Model", bound=nn.Module)

# Random values that are drawn once and repeated; a prime, so that rows of a matrix differ.
BLOCK = 1_000_003
TEXT_LENGTH = 77
ROTARY = ("inv_freq", "original_inv_freq")  # frequencies of rotary position embeddings

UNET: dict[str, dict[str, Any]] = {
    "full": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),  # heads per block: 64 channels each
        "transformer_layers_per_block": (1, 2, 10),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,  # 1280 + 6 * 256
    },
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,  # 32 + 6 * 8
    },
}
_UNET_COMMON: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}

VAE: dict[str, dict[str, Any]] = {
    "full": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 1024,
    },
    "tiny": {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "sample_size": 64,
        "norm_num_groups": 4,
    },
}
_VAE_COMMON: dict[str, Any] = {
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}


def _clip(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# The two text encoders: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14.
TEXT_ENCODER = {"full": _clip(768, 3072, 12, 12), "tiny": _clip(32, 64, 2, 2)}
TEXT_ENCODER_2 = {"full": _clip(1280, 5120, 32, 20), "tiny": TEXT_ENCODER["tiny"]}
# SDXL's files say that the end of text is 2: transformers then pools at the highest token id.
_TEXT_COMMON: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": TEXT_LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

# Llama 2 7B; "layers" is two of its decoder layers, between a vocabulary that weighs little.
LLAMA: dict[str, dict[str, Any]] = {
    "full": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
}
LLAMA["layers"] = {**LLAMA["full"], "num_hidden_layers": 2, "vocab_size": 2048}


def sdxl_unet(size: str = "full") -> UNet2DConditionModel:
    """The UNet of SDXL base 1.0 (2.57 B parameters); ``tiny`` has the same form."""
    return UNet2DConditionModel(**_UNET_COMMON, **UNET[size])


def sdxl_vae(size: str = "full") -> AutoencoderKL:
    """SDXL's autoencoder: 8x downsampling to 4 channels."""
    return AutoencoderKL(**_VAE_COMMON, **VAE[size])


def sdxl_text_encoder(size: str = "full") -> CLIPTextModel:
    """SDXL's first text encoder, CLIP ViT-L/14's."""
    return CLIPTextModel(
        CLIPTextConfig(hidden_act="quick_gelu", **_TEXT_COMMON, **TEXT_ENCODER[size])
    )


def sdxl_text_encoder_2(size: str = "full") -> CLIPTextModelWithProjection:
    """SDXL's second text encoder, OpenCLIP ViT-bigG/14's, with the projection of its end."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_act="gelu", **_TEXT_COMMON, **TEXT_ENCODER_2[size])
    )


def t5_base() -> T5ForConditionalGeneration:
    """T5-base as published: 12 + 12 layers, width 768, 12 heads, tied embeddings (223 M)."""
    config = T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=12,
        feed_forward_proj="relu",
        dropout_rate=0.1,
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def llama_7b(size: str = "full") -> LlamaForCausalLM:
    """Llama 2 7B (6.74 B parameters); ``layers`` and ``tiny`` are two layers, wide and narrow."""
    config = LlamaConfig(
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,  # as in training: nothing is generated
        **LLAMA[size],
    )
    return LlamaForCausalLM(config)


def materialize(
    build: Callable[[], Model],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Model:
    """``build()`` with random weights of ``dtype`` on ``device``, never held in another precision.

    Raises:
        RuntimeError: the model has a buffer whose content this function does not know.
    """
    with torch.device("meta"):
        model = build()
    nn.Module.to(model, dtype).to_empty(device=device)
    if tie := getattr(model, "tie_weights", None):
        tie()  # to_empty gave each use of a shared matrix its own memory
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK, generator=generator).to(device=device, dtype=dtype)
    _recompute_rotary(model, device)
    for module in model.modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            _fill(module, parameter_name, parameter.data, block)
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if buffer_name in ROTARY:
                continue
            if buffer_name != "position_ids":
                raise RuntimeError(f"unknown buffer {buffer_name} in {type(module).__name__}")
            buffer.copy_(torch.arange(buffer.numel(), device=buffer.device).view_as(buffer))
    return model


def _recompute_rotary(model: nn.Module, device: torch.device | str) -> None:
    """Give rotary embeddings the frequencies that their configuration implies, in fp32.

    They are no weights: Transformers computes them, and leaves them out of a model's precision.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, ROTARY[0]):
            fresh: Any = type(module)
            model.set_submodule(name, fresh(module.config).to(device))


def _fill(module: nn.Module, name: str, values: Tensor, block: Tensor) -> None:
    """Set one parameter in place; see the top of the file for the scales."""
    if values.dim() < 2:
        values.fill_(0.0 if name == "bias" else 1.0)
        return
    fan_in = values[0].numel()
    scale = 0.02 if isinstance(module, nn.Embedding) else fan_in**-0.5
    flat = values.view(-1)
    scaled = block * scale
    for start in range(0, flat.numel(), BLOCK):
        part = flat[start : start + BLOCK]
        part.copy_(scaled[: part.numel()])
