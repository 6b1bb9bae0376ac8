"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

from .parts import autoencoder
from .words import qwen3, qwen_tokenizer


def pipeline(**options: Any) -> ZImagePipeline:
    """Two layers after a refiner of image and text each, 4 channels of latents."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": (4, 2, 2),
        "axes_lens": (1024, 64, 64),
    }
    transformer: Any = ZImageTransformer2DModel(**(config | options)).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    words = qwen_tokenizer()
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(qwen3(len(words), 12, 3)).eval(),
        tokenizer=words,
    )
