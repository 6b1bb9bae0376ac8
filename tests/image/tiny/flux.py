"""FLUX.1-dev."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from .parts import autoencoder, clip, tokenizer
from .words import t5_tokenizer


def pipeline(**options: Any) -> FluxPipeline:
    """Two double blocks and two single ones, 4 channels of latents."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    words = t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(words),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**(config | options)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip(16, 8).config).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=words,
    )
