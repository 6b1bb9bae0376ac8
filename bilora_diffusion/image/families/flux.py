"""FLUX.1: CLIP embeds a prompt as one vector, T5 as a sequence; FLUX.1-dev embeds its guidance."""

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

SINGLE_BLOCKS = 38  # of FLUX.1; smaller models have fewer


@dataclass(frozen=True)
class Flux(Family):
    """https://github.com/black-forest-labs/flux

    Default targets are the projections of attention, in double and single blocks. In single blocks
    attention and feed-forward share their output layer, ``proj_out``, which counts as feed-forward.

    It was trained with the shift of sampling, which depends on the resolution: its authors' word in
    https://github.com/Nerogar/OneTrainer/pull/1516.
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
    unguided_scale: ClassVar[float] = 100.0  # no scale makes an unconditional prediction
    reads_negative_prompt: ClassVar[bool] = False
    few_steps: ClassVar[int] = 4  # of FLUX.1-schnell
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
            timestep=levels,  # the model takes it a thousandfold
            guidance=guidance,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=sequence,
            txt_ids=levels.new_zeros(sequence.shape[1], 3),  # tokens of text have no position
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
            f'"{name}" has no guidance embedding, as FLUX.1-schnell, which is distilled to a few'
            " steps: training undoes that, so train on FLUX.1-dev, or give --assistant_lora a"
            " training adapter for it."
        )


def positions(*counts: int, device: torch.device) -> Tensor:
    """Positions of tokens on axes of these lengths, (product of the lengths, axes)."""
    axes = [torch.arange(count, device=device) for count in counts]
    return torch.cartesian_prod(*axes)
