"""Qwen-Image: a video autoencoder, and Qwen2.5-VL as the text encoder."""

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
    LatentSpace,
)
from .tensors import Conditions, pack, pad, pad_if_needed, unpack, unpad


class VideoSpace(LatentSpace):
    """The latent space of a video autoencoder, which takes images as frames, (n, c, 1, h, w)."""

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().distribution(vae, pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def decode_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decode_pixels(vae, latents.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class QwenImage(Family):
    """Qwen-Image, https://arxiv.org/abs/2508.02324

    The training shift is not published. Here it is the sampling shift, like ``qwen_shift`` in
    https://github.com/kohya-ss/musubi-tuner/blob/main/docs/qwen_image.md.
    """

    title: ClassVar[str] = "Qwen-Image"
    pipeline: ClassVar[str] = "QwenImagePipeline"
    examples: ClassVar[Mapping[str, str]] = {"Qwen-Image": "Qwen/Qwen-Image"}
    parts: ClassVar[dict[str, str]] = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    }
    # Without to_add_out, whose output is unused in the last block: with several processes, DDP
    # would wait for its gradient.
    targets: ClassVar[tuple[str, ...]] = (*ATTENTION_LAYERS, *PROMPT_LAYERS)
    feed_forward: ClassVar[tuple[str, ...]] = ("img_mlp", "txt_mlp")
    default_guidance: ClassVar[float] = 4.0
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=64, checkpointed=1, recomputed=26, block=17
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={"Qwen/Qwen-Image": "qwen_image_bf16"},
        text_encoders=("qwen_2.5_vl_7b",),
        text_encoder_type="qwen_image",
        autoencoder="qwen_image_vae",
        shift_node="ModelSamplingAuraFlow",
    )

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, mask = self.encode_prompts(pipeline, prompts)
        if mask is None:  # no prompt is padded
            return {"sequence": list(sequence)}
        return {"sequence": unpad(sequence, mask)}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        count, _, height, width = noisy.shape
        sequence, mask = pad_if_needed(conditions["sequence"])
        tokens = model(
            hidden_states=pack(noisy),  # (n, h/2 w/2, 4 c)
            timestep=levels,
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
        return unpack(tokens, height, width)

    def latent_space(self, vae: Any) -> LatentSpace:
        return VideoSpace.from_config(vae)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        positive_sequence, positive_mask = pad(positive["sequence"])
        negative_sequence, negative_mask = pad(negative["sequence"])
        return {
            "prompt_embeds": positive_sequence,
            "prompt_embeds_mask": positive_mask,
            "negative_prompt_embeds": negative_sequence,
            "negative_prompt_embeds_mask": negative_mask,
            "true_cfg_scale": guidance,
            # Otherwise the pipeline truncates the embedded prompts to 512 tokens.
            "max_sequence_length": max(positive_sequence.shape[1], negative_sequence.shape[1]),
        }

    def embeds_guidance(self, configs: Configs) -> bool:
        if configs["transformer"].get("guidance_embeds"):
            raise UserError(
                "this Qwen-Image has guidance_embeds, which diffusers can't run: give"
                " another --pretrained_model_name_or_path."
            )
        return False
