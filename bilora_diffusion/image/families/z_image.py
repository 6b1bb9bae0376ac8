"""Z-Image: time runs from noise to image, and prompts are lists of their own lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..latent_space import LatentSpace
from .base import Conditions, Family


@dataclass(frozen=True)
class ZImage(Family):
    """https://arxiv.org/abs/2511.22699"""

    title: ClassVar[str] = "Z-Image"
    pipeline: ClassVar[str] = "ZImagePipeline"
    parts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "transformer": "ZImageTransformer2DModel",
            "vae": "AutoencoderKL",
            "text_encoder": "Qwen3Model",
        }
    )
    feed_forward: ClassVar[tuple[str, ...]] = ("feed_forward",)
    guidance: ClassVar[float] = 5.0
    unguided: ClassVar[float] = 0.0
    few_steps: ClassVar[int] = 8  # of Z-Image-Turbo

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequences, _ = pipeline.encode_prompt(
            list(prompts),  # a list of its own: the pipeline writes into it
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"sequence": sequences}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        frames = model(list(noisy.unsqueeze(2)), 1 - levels, conditions["sequence"]).sample
        return -torch.stack(frames).squeeze(2)

    def space(self, vae: Any) -> LatentSpace:
        return LatentSpace.of(vae, drawn=False)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        return {
            "prompt_embeds": positive["sequence"],
            "negative_prompt_embeds": negative["sequence"],
            "guidance_scale": guidance,
        }

    def is_distilled(self, pipeline: Any) -> bool:
        # Nothing in its files says so.
        return "turbo" in Path(pipeline.name_or_path or "").name.lower()

    def remark(self, name: str, pipeline: Any) -> str | None:
        if not self.is_distilled(pipeline):
            return None
        return (
            f'"{name}" is distilled to a few steps without guidance, which training undoes: train'
            " on Z-Image, the model that it was made from, and draw with this one."
        )
