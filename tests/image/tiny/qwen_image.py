"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .words import qwen_tokenizer

VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    "bos_token_id": None,
    "eos_token_id": None,
}


def pipeline(**options: Any) -> QwenImagePipeline:
    """Two layers, latents of 4 channels."""
    words = qwen_tokenizer()
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    encoder = Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(words)},
        vision_config={**VISION, "out_hidden_size": 16},
    )
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(**(config | options)),
        scheduler=shifted(max_image_seq_len=8192, max_shift=0.9),
        vae=video_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder).eval(),
        tokenizer=words,
    )


def shifted(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    """Noise levels that depend on how many tokens an image has."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


def video_autoencoder() -> AutoencoderKLQwenImage:
    """Of 8 pixels a latent, whose channels have means and deviations of their own."""
    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    ).eval()
