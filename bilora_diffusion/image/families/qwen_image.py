"""Qwen-Image: an autoencoder of videos, and Qwen2.5-VL as its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ..latent_space import LatentSpace
from .base import Conditions, Configs, Family, packed, padded, unpacked


class VideoSpace(LatentSpace):
    """Of an autoencoder of videos, to which an image is one frame: (n, c, 1, h, w)."""

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().distribution(vae, pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return super().pixels(vae, latents.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class QwenImage(Family):
    """https://arxiv.org/abs/2508.02324"""

    title: ClassVar[str] = "Qwen-Image"
    pipeline: ClassVar[str] = "QwenImagePipeline"
    parts: ClassVar[dict[str, str]] = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    }
    # Not to_add_out: nothing reads the last block's, and several processes would wait for its
    # gradient.
    targets: ClassVar[tuple[str, ...]] = (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj"),
    )
    feed_forward: ClassVar[tuple[str, ...]] = ("img_mlp", "txt_mlp")
    guidance: ClassVar[float] = 4.0

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, mask = self.encoded(pipeline, prompts)
        return {"sequence": list(sequence) if mask is None else unpadded(sequence, mask)}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        count, _, height, width = noisy.shape
        sequence, mask = told(conditions["sequence"])
        tokens = model(
            hidden_states=packed(noisy),
            timestep=levels,
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
        return unpacked(tokens, height, width)

    def space(self, vae: Any) -> LatentSpace:
        return VideoSpace.of(vae)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        sequence, mask = padded(positive["sequence"])
        against, its_mask = padded(negative["sequence"])
        return {
            "prompt_embeds": sequence,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": against,
            "negative_prompt_embeds_mask": its_mask,
            "true_cfg_scale": guidance,
            # Else the pipeline cuts to 512 tokens what is embedded already.
            "max_sequence_length": max(sequence.shape[1], against.shape[1]),
        }

    def told_guidance(self, configs: Configs) -> bool:
        if configs["transformer"].get("guidance_embeds"):
            raise UserError(
                "this Qwen-Image has guidance_embeds, with which diffusers can't run it: give"
                " another --pretrained_model_name_or_path."
            )
        return False


def unpadded(sequence: Tensor, mask: Tensor) -> list[Tensor]:
    """Of sequences (n, length, ...) the tokens that the mask (n, length) has, (count, ...) each."""
    return [row[real.bool()] for row, real in zip(sequence, mask, strict=True)]


def told(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """As ``padded``, without a mask where nothing is padded: attention is faster so."""
    sequence, mask = padded(rows)
    return sequence, None if all(len(row) == len(rows[0]) for row in rows) else mask.bool()
