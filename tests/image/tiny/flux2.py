"""FLUX.2 klein before its distillation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3ForCausalLM

from .words import qwen3, qwen_tokenizer


def pipeline(**options: Any) -> Flux2KleinPipeline:
    """One double block and three single ones, 4 channels of latents; an encoder of as many layers
    as the pipeline reads.
    """
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
    }
    words = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**(config | options)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(),
        text_encoder=Qwen3ForCausalLM(qwen3(len(words), 8, 28)).eval(),
        tokenizer=words,
    )


def _autoencoder() -> AutoencoderKLFlux2:
    torch.manual_seed(1)
    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()
