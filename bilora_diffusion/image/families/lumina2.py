"""Lumina-Image 2.0: time runs from noise to image, and prompts follow a system prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from .base import Activations, Family, mu_of
from .tensors import Conditions, pad, unpad


@dataclass(frozen=True)
class Lumina2(Family):
    """Lumina-Image 2.0, https://arxiv.org/abs/2503.21758"""

    title: ClassVar[str] = "Lumina 2"
    pipeline: ClassVar[str] = "Lumina2Pipeline"
    examples: ClassVar[Mapping[str, str]] = {"Lumina 2": "Alpha-VLLM/Lumina-Image-2.0"}
    parts: ClassVar[dict[str, str]] = {
        "transformer": "Lumina2Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Gemma2Model",
    }
    feed_forward: ClassVar[tuple[str, ...]] = ("feed_forward",)
    default_guidance: ClassVar[float] = 4.0
    # `embed` prepends the system prompt, which a negative prompt must not have.
    reads_negative_prompt: ClassVar[bool] = False
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=64, checkpointed=3.3, recomputed=45, block=35
    )

    max_sequence_length: int = 256

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        # All image tokens take the position after the last text token.
        positions = pipeline.transformer.config.axes_lens[0] - 1
        if self.max_sequence_length > positions:
            raise UserError(
                f"--max_sequence_length {self.max_sequence_length} is more tokens than this"
                f" {self.title} has positions for: give at most {positions}."
            )
        sequence, mask, _, _ = self.encode_prompts(
            pipeline, prompts, do_classifier_free_guidance=False
        )
        return {"sequence": unpad(sequence, mask)}

    def negative(self, pipeline: Any, empty: Conditions) -> Conditions:
        # The pipeline prepends no system prompt to a negative prompt, so "" is a single token.
        # All texts begin with this token, and its hidden state does not depend on later tokens.
        return {"sequence": [row[:1] for row in empty["sequence"]]}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        sequence, mask = pad(conditions["sequence"])
        # The model's time runs from noise to image, so its velocity has the opposite sign.
        return -model(
            noisy,
            timestep=1 - levels,
            encoder_hidden_states=sequence,
            encoder_attention_mask=mask,
        ).sample

    def training_shift(self, tokens: int) -> float | None:
        # FLUX.1's shift, as with `do_shift` in the authors' transport/transport.py. The scheduler's
        # shift of 6 is for sampling: https://github.com/Alpha-VLLM/Lumina-Image-2.0/issues/42
        return math.exp(mu_of(tokens, {}))

    def mu(self, pipeline: Any, tokens: int) -> float:
        # The pipeline passes its number of latent channels as the number of tokens.
        return super().mu(pipeline, pipeline.transformer.config.in_channels)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        # Padded to one length, since the pipeline requires equal lengths.
        sequences, masks = pad([*positive["sequence"], *negative["sequence"]])
        positive_sequence, negative_sequence = sequences.chunk(2)
        positive_mask, negative_mask = masks.chunk(2)
        return {
            "prompt_embeds": positive_sequence,
            "prompt_attention_mask": positive_mask,
            "negative_prompt_embeds": negative_sequence,
            "negative_prompt_attention_mask": negative_mask,
            "guidance_scale": guidance,
        }
