"""Krea 2: Qwen-Image's autoencoder, and states of several layers of Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Krea2Pipeline
from torch import Tensor, nn

from ..latent_space import LatentSpace
from .base import Conditions, Family, packed, padded, unpacked
from .qwen_image import VideoSpace, told, unpadded


@dataclass(frozen=True)
class Krea2(Family):
    """https://www.krea.ai/blog/krea-2-technical-report

    A prompt is kept without its padding, (tokens, layers, width): the transformer gives the tokens
    of a text no positions and masks the padding, so nothing changes, and most prompts are short.
    """

    title: ClassVar[str] = "Krea 2"
    pipeline: ClassVar[str] = "Krea2Pipeline"
    parts: ClassVar[dict[str, str]] = {
        "transformer": "Krea2Transformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen3VLModel",
    }
    targets: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0", "to_gate")
    guidance: ClassVar[float] = 4.5
    unguided: ClassVar[float] = 0.0
    few_steps: ClassVar[int] = 8  # of Krea 2 Turbo
    undistilled: ClassVar[str] = "the model that it was made from, Krea 2 RAW"

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, mask = self.encoded(pipeline, prompts)
        return {"sequence": unpadded(sequence, mask)}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        height, width = noisy.shape[2:]
        sequence, mask = told(conditions["sequence"])
        tokens = model(
            hidden_states=packed(noisy),
            encoder_hidden_states=sequence,
            timestep=levels,
            position_ids=Krea2Pipeline.prepare_position_ids(
                sequence.shape[1], height // 2, width // 2, noisy.device
            ),
            encoder_attention_mask=mask,
        ).sample
        return unpacked(tokens, height, width)

    def space(self, vae: Any) -> LatentSpace:
        return VideoSpace.of(vae)

    def mu(self, pipeline: Any, tokens: int) -> float:
        return 1.15 if self.is_distilled(pipeline) else super().mu(pipeline, tokens)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        # Equally long, since the pipeline gives both the same positions.
        sequence, mask = padded([*positive["sequence"], *negative["sequence"]])
        (wanted, unwanted), (its_mask, the_other) = sequence.chunk(2), mask.bool().chunk(2)
        return {
            "prompt_embeds": wanted,
            "prompt_embeds_mask": its_mask,
            "negative_prompt_embeds": unwanted,
            "negative_prompt_embeds_mask": the_other,
            "guidance_scale": guidance,
        }
