"""Stable Diffusion 3 without T5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from .parts import autoencoder, clip, tokenizer


def pipeline(**options: Any) -> StableDiffusion3Pipeline:
    """Two layers, 8 x 8 latents."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    absent: Any = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(config | options)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip(16, 8),
        tokenizer=tokenizer(),
        text_encoder_2=clip(8, 12),
        tokenizer_2=tokenizer(),
        **absent,
    )
