"""Stable Diffusion 3 and 3.5: two CLIP encoders and an optional T5 encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from .base import (
    ATTENTION_LAYERS,
    PROMPT_LAYERS,
    Activations,
    ComfyUI,
    Configs,
    Family,
    Unconditional,
    latent_pixels,
)
from .tensors import Conditions


@dataclass(frozen=True)
class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, https://arxiv.org/abs/2403.03206

    At 1024 pixels, the noise levels have a shift of 3 in training as in sampling (Section 5.3.2).
    """

    title: ClassVar[str] = "Stable Diffusion 3"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    examples: ClassVar[Mapping[str, str]] = {
        "Stable Diffusion 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
        "Stable Diffusion 3.5 large": "stabilityai/stable-diffusion-3.5-large",
    }
    parts: ClassVar[dict[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    optional: ClassVar[frozenset[str]] = frozenset({"text_encoder_3", "tokenizer_3"})
    targets: ClassVar[tuple[str, ...]] = (*ATTENTION_LAYERS, *PROMPT_LAYERS, "to_add_out")
    feed_forward: ClassVar[tuple[str, ...]] = ("ff", "ff_context")
    weighting: ClassVar[str] = "logit_normal"
    default_guidance: ClassVar[float] = 7.0
    unconditional: ClassVar[Unconditional] = Unconditional.FIRST_ROWS
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=154, checkpointed=1, recomputed=25, block=21
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={
            "stabilityai/stable-diffusion-3.5-medium": "sd3.5_medium",
            "stabilityai/stable-diffusion-3.5-large": "sd3.5_large",
        },
        text_encoders=("clip_l", "clip_g", "t5xxl_fp16"),
        shift_node="ModelSamplingSD3",
        scheduler="normal",
    )

    max_sequence_length: int = 77

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, _, pooled, _ = pipeline.encode_prompt(
            # One list for each text encoder.
            list(prompts),
            list(prompts),
            list(prompts),
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"sequence": sequence, "pooled": pooled}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        return model(
            noisy,
            timestep=1000 * levels,  # the timestep embedding takes 0 to 1000
            encoder_hidden_states=conditions["sequence"],
            pooled_projections=conditions["pooled"],
        ).sample

    def require_resolution(self, resolution: int, configs: Configs) -> None:
        super().require_resolution(resolution, configs)
        config = configs["transformer"]
        # Number of latents along a side for which there are position embeddings.
        latents = config.get("pos_embed_max_size", 96) * config.get("patch_size", 2)
        largest_side = latents * latent_pixels(configs["vae"])
        if resolution > largest_side:
            raise UserError(
                f"a side of {resolution} pixels is more than this {self.title} has positions for:"
                f" give at most {largest_side}."
            )
