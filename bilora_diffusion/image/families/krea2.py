"""Krea 2: Qwen-Image's autoencoder; prompts are hidden states of several Qwen3-VL layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Krea2Pipeline
from torch import Tensor, nn

from .base import ATTENTION_LAYERS, Activations, ComfyUI, Family, LatentSpace
from .qwen_image import VideoSpace
from .tensors import Conditions, pack, pad, pad_if_needed, unpack, unpad


@dataclass(frozen=True)
class Krea2(Family):
    """Krea 2, https://www.krea.ai/blog/krea-2-technical-report

    Embedded prompts, (tokens, layers, width), have no padding, since most prompts are short.
    Padding would change nothing: the transformer masks it and gives text tokens no positions.

    Turbo was trained with the sampling shift
    (https://github.com/krea-ai/krea-2/blob/main/sampling.py). Raw's training shift is not
    published; here it is the sampling shift, like ``krea2_shift`` in
    https://github.com/kohya-ss/musubi-tuner/blob/main/docs/krea2.md.
    """

    title: ClassVar[str] = "Krea 2"
    pipeline: ClassVar[str] = "Krea2Pipeline"
    examples: ClassVar[Mapping[str, str]] = {"Krea 2": "krea/Krea-2-Raw"}
    parts: ClassVar[dict[str, str]] = {
        "transformer": "Krea2Transformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen3VLModel",
    }
    targets: ClassVar[tuple[str, ...]] = (*ATTENTION_LAYERS, "to_gate")
    default_guidance: ClassVar[float] = 4.5
    unguided_scale: ClassVar[float] = 0.0
    few_steps: ClassVar[int] = 8  # for Krea 2 Turbo
    undistilled_model: ClassVar[str] = "Krea 2 Raw, the model it was distilled from,"
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=64, checkpointed=1.2, recomputed=29, block=22
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={"krea/Krea-2-Raw": "krea2_raw_bf16"},
        text_encoders=("qwen3vl_4b_bf16",),
        text_encoder_type="krea2",
        autoencoder="qwen_image_vae",
        shift_node="ModelSamplingFlux",
    )

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, mask = self.encode_prompts(pipeline, prompts)
        return {"sequence": unpad(sequence, mask)}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        height, width = noisy.shape[2:]
        sequence, mask = pad_if_needed(conditions["sequence"])
        tokens = model(
            hidden_states=pack(noisy),  # (n, h/2 w/2, 4 c)
            encoder_hidden_states=sequence,
            timestep=levels,
            position_ids=Krea2Pipeline.prepare_position_ids(
                sequence.shape[1], height // 2, width // 2, noisy.device
            ),
            encoder_attention_mask=mask,
        ).sample
        return unpack(tokens, height, width)

    def latent_space(self, vae: Any) -> LatentSpace:
        return VideoSpace.from_config(vae)

    def mu(self, pipeline: Any, tokens: int) -> float:
        if self.is_distilled(pipeline):
            return 1.15  # as in the pipeline
        return super().mu(pipeline, tokens)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        # Padded to one length, since the pipeline uses the same positions for both.
        sequences, masks = pad([*positive["sequence"], *negative["sequence"]])
        positive_sequence, negative_sequence = sequences.chunk(2)
        positive_mask, negative_mask = masks.bool().chunk(2)
        return {
            "prompt_embeds": positive_sequence,
            "prompt_embeds_mask": positive_mask,
            "negative_prompt_embeds": negative_sequence,
            "negative_prompt_embeds_mask": negative_mask,
            "guidance_scale": guidance,
        }
