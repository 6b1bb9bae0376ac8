"""Krea 2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from .qwen_image import TEXT, VISION, shifted, video_autoencoder
from .words import qwen_tokenizer


def pipeline(*, is_distilled: bool = False, **options: Any) -> Krea2Pipeline:
    """Two layers that read three of the encoder's states."""
    words = qwen_tokenizer()
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 2, 2),
    }
    encoder = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "vocab_size": len(words)},
        vision_config={**VISION, "out_hidden_size": 16, "deepstack_visual_indexes": [0]},
    )
    return Krea2Pipeline(
        transformer=Krea2Transformer2DModel(**(config | options)),
        scheduler=shifted(max_image_seq_len=6400),
        vae=video_autoencoder(),
        text_encoder=Qwen3VLModel(encoder).eval(),
        tokenizer=words,
        text_encoder_select_layers=(0, 1, 2),
        is_distilled=is_distilled,
    )
