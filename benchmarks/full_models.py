"""The image models that can be trained, at full size, as their published ``config.json`` have them.

Only what decides about memory: denoisers and text encoders; of an autoencoder no more than how many
channels its latents have. Where diffusers' defaults are a model's own, nothing is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from random_models import sdxl_text_encoder, sdxl_text_encoder_2, sdxl_unet
from torch import Tensor, nn

from bilora_diffusion.image.families import named

SHORT = 64
"""Tokens of a prompt where these are kept without padding: a long caption."""


@dataclass(frozen=True)
class FullModel:
    """One model.

    Args:
        pipeline: the class of its pipeline, which decides on its family.
        denoiser, encoders: make the models.
        sequence, pooled: shapes of what the encoders give for one prompt.
        listed: whether each prompt has a length of its own.
        channels, factor: of the latents, and pixels of the side of one.
    """

    pipeline: str
    denoiser: Callable[[], nn.Module]
    encoders: tuple[Callable[[], nn.Module], ...]
    sequence: tuple[int, ...]
    pooled: int | None = None
    listed: bool = False
    channels: int = 16
    factor: int = 8

    @property
    def family(self) -> Any:
        """With its usual settings."""
        return named(self.pipeline, self.pipeline)()

    def inputs(self, batch: int, side: int) -> dict[str, Any]:
        """What `DreamBoothModule` takes for so many images of so many pixels a side."""
        latent = (batch, self.channels, side // self.factor, side // self.factor)
        sequence = torch.zeros(batch, *self.sequence)
        told: dict[str, Any] = {"sequence": list(sequence) if self.listed else sequence}
        if self.pooled is not None:
            told["pooled"] = torch.zeros(batch, self.pooled)
        drawn: dict[str, Tensor] = {
            "latents": torch.zeros(latent),
            "noise": torch.zeros(latent),
            "index": torch.zeros(batch, dtype=torch.long),
            "instance": torch.ones(batch, dtype=torch.bool),
            "time_ids": torch.zeros(batch, 6),
        }
        return {**drawn, **told}


def _denoiser(kind: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(diffusers, kind)(**config)


def _encoder(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**settings))


def _qwen3(width: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }


T5_XXL = _encoder(
    "T5EncoderModel",
    "T5Config",
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    feed_forward_proj="gated-gelu",
    vocab_size=32128,
)
QWEN_VL = _encoder(
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLConfig",
    text_config={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    vision_config={"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
)
QWEN3_VL = _encoder(
    "Qwen3VLModel",
    "Qwen3VLConfig",
    text_config=_qwen3(2560, 9728),
    vision_config={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    | {"num_heads": 16, "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
)
SD35 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
SD3_ENCODERS = (sdxl_text_encoder, sdxl_text_encoder_2, T5_XXL)

MODELS: dict[str, FullModel] = {
    "Stable Diffusion XL": FullModel(
        "StableDiffusionXLPipeline",
        sdxl_unet,
        (sdxl_text_encoder, sdxl_text_encoder_2),
        sequence=(77, 2048),
        pooled=1280,
        channels=4,
    ),
    "Stable Diffusion 3.5 medium": FullModel(
        "StableDiffusion3Pipeline",
        _denoiser(
            "SD3Transformer2DModel",
            **SD35,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        ),
        SD3_ENCODERS,
        sequence=(154, 4096),
        pooled=2048,
    ),
    "Stable Diffusion 3.5 large": FullModel(
        "StableDiffusion3Pipeline",
        _denoiser(
            "SD3Transformer2DModel",
            **SD35,
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
        ),
        SD3_ENCODERS,
        sequence=(154, 4096),
        pooled=2048,
    ),
    "FLUX.1-dev": FullModel(
        "FluxPipeline",
        _denoiser("FluxTransformer2DModel", guidance_embeds=True),
        (sdxl_text_encoder, T5_XXL),
        sequence=(512, 4096),
        pooled=768,
    ),
    "FLUX.2 klein 9B": FullModel(
        "Flux2KleinPipeline",
        _denoiser(
            "Flux2Transformer2DModel",
            num_single_layers=24,
            num_attention_heads=32,
            joint_attention_dim=12288,
            guidance_embeds=False,
        ),
        (_encoder("Qwen3ForCausalLM", "Qwen3Config", **_qwen3(4096, 12288)),),
        sequence=(512, 12288),
        channels=128,
        factor=16,
    ),
    "Z-Image": FullModel(
        "ZImagePipeline",
        _denoiser("ZImageTransformer2DModel"),
        (_encoder("Qwen3Model", "Qwen3Config", **_qwen3(2560, 9728)),),
        sequence=(SHORT, 2560),
        listed=True,
    ),
    "Qwen-Image": FullModel(
        "QwenImagePipeline",
        _denoiser("QwenImageTransformer2DModel"),
        (QWEN_VL,),
        sequence=(SHORT, 3584),
        listed=True,
    ),
    "Krea 2": FullModel(
        "Krea2Pipeline",
        _denoiser("Krea2Transformer2DModel"),
        (QWEN3_VL,),
        sequence=(SHORT, 12, 2560),
        listed=True,
    ),
    "Lumina 2": FullModel(
        "Lumina2Pipeline",
        _denoiser("Lumina2Transformer2DModel", cap_feat_dim=2304),
        (
            _encoder(
                "Gemma2Model",
                "Gemma2Config",
                hidden_size=2304,
                intermediate_size=9216,
                num_hidden_layers=26,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=256,
                vocab_size=256000,
            ),
        ),
        sequence=(SHORT, 2304),
        listed=True,
    ),
}
