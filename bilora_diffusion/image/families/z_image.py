"""Z-Image: time runs from noise to image, and prompts are lists of their own lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    parts: ClassVar[dict[str, str]] = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
    }
    feed_forward: ClassVar[tuple[str, ...]] = ("feed_forward",)
    guidance: ClassVar[float] = 5.0
    unguided: ClassVar[float] = 0.0
    few_steps: ClassVar[int] = 8  # of Z-Image-Turbo
    undistilled: ClassVar[str] = "Z-Image, the model that it was made from"

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequences, _ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False)
        return {"sequence": sequences}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        frames = model(list(noisy.unsqueeze(2)), 1 - levels, conditions["sequence"]).sample
        return -torch.stack(frames).squeeze(2)

    def space(self, vae: Any) -> LatentSpace:
        return LatentSpace.of(vae, drawn=False)

    def is_distilled(self, pipeline: Any) -> bool:
        # Nothing in its files says so.
        return "turbo" in Path(pipeline.name_or_path or "").name.lower()
