"""Tiny pipelines of the flow-matching models, genuine but for their size and random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
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


def sd3(**options: Any) -> StableDiffusion3Pipeline:
    """Of Stable Diffusion 3 without T5."""
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
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(config | options)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip(16, 8),
        tokenizer=tokenizer(),
        text_encoder_2=clip(8, 12),
        tokenizer_2=tokenizer(),
        **dict.fromkeys(("text_encoder_3", "tokenizer_3")),
    )


PIPELINES: dict[str, Callable[[], Any]] = {"StableDiffusion3Pipeline": sd3}
"""By the names of their classes."""


def saved(kind: str, folder: Path) -> Path:
    """A pipeline in diffusers' format, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    PIPELINES[kind]().save_pretrained(folder)
    return folder
