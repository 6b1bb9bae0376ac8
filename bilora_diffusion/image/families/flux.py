"""FLUX.1: CLIP embeds a prompt as a vector, T5 as a sequence; FLUX.1-dev embeds the guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import (
    ATTENTION_LAYERS,
    PROMPT_LAYERS,
    Activations,
    ComfyUI,
    Configs,
    Family,
    Unconditional,
)
from .tensors import Conditions, pack, unpack

SINGLE_BLOCKS = 38  # in FLUX.1; smaller models have fewer


@dataclass(frozen=True)
class Flux(Family):
    """FLUX.1, https://github.com/black-forest-labs/flux

    The default targets are the attention projections of the double and single blocks. In a single
    block, attention and feed-forward layers share one output layer, ``proj_out``, which counts as
    feed-forward.

    According to https://github.com/Nerogar/OneTrainer/pull/1516, the model's authors confirmed that
    it was trained with the sampling shift, which depends on the resolution.
    """

    title: ClassVar[str] = "FLUX.1"
    pipeline: ClassVar[str] = "FluxPipeline"
    examples: ClassVar[Mapping[str, str]] = {"FLUX.1-dev": "black-forest-labs/FLUX.1-dev"}
    parts: ClassVar[dict[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    targets: ClassVar[tuple[str, ...]] = (*ATTENTION_LAYERS, *PROMPT_LAYERS, "to_add_out")
    feed_forward: ClassVar[tuple[str, ...]] = (
        "ff",
        "ff_context",
        "proj_mlp",
        *(f"single_transformer_blocks.{i}.proj_out" for i in range(SINGLE_BLOCKS)),
    )
    default_guidance: ClassVar[float] = 3.5
    unconditional: ClassVar[Unconditional] = Unconditional.NONE  # guidance is embedded
    unguided_scale: ClassVar[float] = 100.0  # no allowed guidance scale is larger
    reads_negative_prompt: ClassVar[bool] = False
    few_steps: ClassVar[int] = 4  # for FLUX.1-schnell
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=512, checkpointed=1, recomputed=27, block=14.6
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={"black-forest-labs/FLUX.1-dev": "flux1-dev"},
        text_encoders=("clip_l", "t5xxl_fp16"),
        text_encoder_type="flux",
        autoencoder="ae",
        shift_node="ModelSamplingFlux",
        embeds_guidance=True,
    )

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, pooled, _ = self.encode_prompts(pipeline, prompts)
        return {"sequence": sequence, "pooled": pooled}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        config: Any = model.config
        count, _, height, width = noisy.shape
        sequence = conditions["sequence"]
        guidance = None
        if config.guidance_embeds:
            guidance = noisy.new_full((count,), self.guidance_scale)
        tokens = model(
            hidden_states=pack(noisy),  # (n, h/2 w/2, 4 c)
            timestep=levels,  # the model multiplies it by 1000
            guidance=guidance,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=sequence,
            txt_ids=levels.new_zeros(sequence.shape[1], 3),  # text tokens have no position
            img_ids=positions(1, height // 2, width // 2, device=levels.device),
        ).sample
        return unpack(tokens, height, width)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        return {
            "prompt_embeds": positive["sequence"],
            "pooled_prompt_embeds": positive["pooled"],
            "guidance_scale": guidance,
        }

    def is_distilled(self, pipeline: Any) -> bool:
        return not self.embeds_guidance({"transformer": pipeline.transformer.config})

    def embeds_guidance(self, configs: Configs) -> bool:
        return bool(configs["transformer"].get("guidance_embeds"))

    def remark(self, name: str, pipeline: Any) -> str | None:
        if not self.is_distilled(pipeline):
            return None
        return (
            f'"{name}" has no guidance embedding, so like FLUX.1-schnell it is probably distilled'
            " to a few steps, and training undoes the distillation: train on FLUX.1-dev, or give"
            " --assistant_lora a training adapter for this model."
        )


def positions(*counts: int, device: torch.device) -> Tensor:
    """Return the positions of tokens on a grid, (number of tokens, number of axes).

    Args:
        counts: number of positions along each axis of the grid.
    """
    axes = [torch.arange(count, device=device) for count in counts]
    return torch.cartesian_prod(*axes)
