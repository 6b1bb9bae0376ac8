"""FLUX.2 klein: prompts are hidden states of three Qwen3 layers; latents are normalized patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from ...core.values import ALL_LAYERS, ALL_LINEAR
from .base import (
    ATTENTION_LAYERS,
    PROMPT_LAYERS,
    Activations,
    ComfyUI,
    Configs,
    Family,
    LatentSpace,
    mu_of,
)
from .flux import positions
from .tensors import Conditions

SINGLE_BLOCKS = 48  # in FLUX.2-dev; klein has 20 or 24


@dataclass(frozen=True)
class PatchSpace(LatentSpace):
    """A latent space of normalized patches, (n, 4 c, h, w), of 2 x 2 latents, (n, c, 2 h, 2 w)."""

    def encode(self, latents: Tensor) -> Tensor:
        return super().encode(nn.functional.pixel_unshuffle(latents, 2))

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(super().decode(latents), 2)


@dataclass(frozen=True)
class Flux2Klein(Family):
    """FLUX.2 klein, https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence

    The default targets are the attention projections. In the single blocks, which make up most of
    the model, they are parts of two larger layers, each of which gets one adapter as a whole.
    """

    title: ClassVar[str] = "FLUX.2 klein"
    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    examples: ClassVar[Mapping[str, str]] = {
        "FLUX.2 klein 9B": "black-forest-labs/FLUX.2-klein-base-9B"
    }
    parts: ClassVar[dict[str, str]] = {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
    }
    targets: ClassVar[tuple[str, ...]] = (
        *ATTENTION_LAYERS,
        *PROMPT_LAYERS,
        "to_add_out",
        "to_qkv_mlp_proj",
        # Full names, since "to_out" is a list of modules in the double blocks.
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(SINGLE_BLOCKS)),
    )
    feed_forward: ClassVar[tuple[str, ...]] = ("ff", "ff_context")
    default_guidance: ClassVar[float] = 4.0
    few_steps: ClassVar[int] = 4  # for klein without "base" in its name
    undistilled_model: ClassVar[str] = "its base model, such as FLUX.2-klein-base-4B,"
    steps: ClassVar[int] = 50  # the pipeline's default, for its shift
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=512, checkpointed=1, recomputed=100, block=24
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={
            "black-forest-labs/FLUX.2-klein-base-4B": "flux-2-klein-base-4b",
            "black-forest-labs/FLUX.2-klein-base-9B": "flux-2-klein-base-9b",
        },
        text_encoders=("qwen_3_8b",),
        text_encoder_type="flux2",
        text_encoders_by_size={"4b": ("qwen_3_4b",)},
        autoencoder="flux2-vae",
        latent_node="EmptyFlux2LatentImage",
        scheduler_node="Flux2Scheduler",  # also shifts the noise levels
        unread_groups=frozenset((ALL_LAYERS, ALL_LINEAR)),
        unread_layers="the modulation and timestep layers",
    )

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequence, _ = self.encode_prompts(pipeline, prompts)
        return {"sequence": sequence}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        height, width = noisy.shape[2:]
        sequence = conditions["sequence"]
        tokens = model(
            hidden_states=noisy.flatten(2).transpose(1, 2),  # (n, h w, 4 c)
            timestep=levels,  # the model multiplies it by 1000
            encoder_hidden_states=sequence,
            txt_ids=positions(1, 1, 1, sequence.shape[1], device=levels.device),
            img_ids=positions(1, height, width, 1, device=levels.device),
        ).sample
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def is_guided(self, guidance: float, index: Mapping[str, Any], configs: Configs) -> bool:
        # The pipeline ignores the guidance scale for a distilled model.
        is_distilled = bool(index.get("is_distilled"))
        return super().is_guided(guidance, index, configs) and not is_distilled

    def latent_space(self, vae: Any) -> LatentSpace:
        # Running statistics of a batch normalization over the patches' channels, (1, 4 c, 1, 1).
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        variance = vae.bn.running_var.view(1, -1, 1, 1)
        std = (variance + vae.config.batch_norm_eps).sqrt()
        return PatchSpace(1.0, mean, std, samples_posterior=False)

    def training_shift(self, tokens: int) -> float | None:
        # According to the authors, FLUX.1's shift: https://github.com/Nerogar/OneTrainer/pull/1516.
        # musubi-tuner's `flux2_shift` is the same shift:
        # https://github.com/kohya-ss/musubi-tuner/blob/main/docs/flux_2.md
        return math.exp(mu_of(tokens, {}))

    def mu(self, pipeline: Any, tokens: int) -> float:
        # A higher shift, used only for sampling:
        # https://github.com/black-forest-labs/flux2/blob/main/src/flux2/sampling.py
        return compute_empirical_mu(tokens, self.steps)

    def prepare_sampler(self, sampler: Any) -> None:
        # The pipeline undoes the normalization and the patches before it returns latents. With
        # these statistics, undoing the normalization does not change the values.
        statistics = SimpleNamespace(running_mean=torch.zeros(1), running_var=torch.ones(1))
        sampler.vae = SimpleNamespace(bn=statistics, config=SimpleNamespace(batch_norm_eps=0.0))

    def unpack_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        return nn.functional.pixel_unshuffle(latents, 2)
