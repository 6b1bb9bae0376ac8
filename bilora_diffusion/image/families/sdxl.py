"""Stable Diffusion XL: a UNet conditioned on two CLIP encoders and on sizes and crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Activations, ComfyUI, Configs, Family, Unconditional, latent_pixels
from .tensors import Conditions

ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class StableDiffusionXL(Family):
    """Stable Diffusion XL, https://arxiv.org/abs/2307.01952"""

    title: ClassVar[str] = "Stable Diffusion XL"
    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"
    examples: ClassVar[Mapping[str, str]] = {
        "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0"
    }
    tested_on: ClassVar[str] = "full size, random weights"
    parts: ClassVar[dict[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    denoiser: ClassVar[str] = "unet"
    flow: ClassVar[bool] = False
    unconditional: ClassVar[Unconditional] = Unconditional.FIRST_ROWS
    patch: ClassVar[int] = 8
    # The whole UNet counts as one block, and each latent as one token.
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=0, checkpointed=46, recomputed=7, block=540
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={"stabilityai/stable-diffusion-xl-base-1.0": "sd_xl_base_1.0"},
        latent_node="EmptyLatentImage",
        scheduler="normal",
    )

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        device = next(pipeline.text_encoder.parameters()).device
        ids = [tokens.to(device) for tokens in tokenize(pipeline, prompts)]
        return encode([getattr(pipeline, name) for name in ENCODERS], ids)

    def negative(self, pipeline: Any, empty: Conditions) -> Conditions:
        if not pipeline.config.force_zeros_for_empty_prompt:  # SDXL base has True
            return empty
        return {name: torch.zeros_like(values) for name, values in empty.items()}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
        return model(noisy, levels, conditions["sequence"], added_cond_kwargs=added).sample

    def is_guided(self, guidance: float, index: Mapping[str, Any], configs: Configs) -> bool:
        # A model with a guidance embedding, such as a latent consistency model, makes only the
        # conditional prediction.
        embeds_guidance = configs["unet"].get("time_cond_proj_dim") is not None
        return super().is_guided(guidance, index, configs) and not embeds_guidance

    def width(self, config: Mapping[str, Any]) -> int:
        return config["block_out_channels"][0]

    def side_of(self, configs: Configs) -> int:
        side = configs["unet"].get("sample_size")
        if not (isinstance(side, int) and side > 0):
            raise ValueError(f"its sample_size is {side!r}, but Stable Diffusion XL's is 128")
        return side * latent_pixels(configs["vae"])


def tokenize(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the token ids from both tokenizers, (n, tokens) each.

    They are padded or truncated to the model's length.
    """
    ids = []
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids.append(tokens.input_ids)
    return tuple(ids)


def encode(encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> Conditions:
    """Embed token ids as ``StableDiffusionXLPipeline.encode_prompt`` does.

    Returns:
        ``sequence``: the penultimate hidden states of both encoders, concatenated to (n, tokens,
        sum of the widths). ``pooled``: the second encoder's projected output, (n, width).
    """
    outputs = []
    for encoder, tokens in zip(encoders, ids, strict=True):
        outputs.append(encoder(tokens, output_hidden_states=True))
    states = [output.hidden_states[-2] for output in outputs]
    return {"sequence": torch.cat(states, dim=-1), "pooled": outputs[-1][0]}
