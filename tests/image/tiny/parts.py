"""Parts that several tiny pipelines have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from bilora_diffusion.mini import pipeline_dir


def clip(width: int, projection: int) -> Any:
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words.get_vocab()),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return CLIPTextModelWithProjection(config).eval()


def tokenizer() -> Any:
    """The miniature's."""
    return CLIPTokenizer.from_pretrained(pipeline_dir() / "tokenizer")


def autoencoder(channels: int = 4, **options: Any) -> Any:
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "scaling_factor": 1.5,
        "shift_factor": 0.06,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**(config | options)).eval()
