"""Z-Image: time runs from noise to image, and embedded prompts are an unpadded list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Activations, ComfyUI, Family, LatentSpace, Unconditional
from .tensors import Conditions


@dataclass(frozen=True)
class ZImage(Family):
    """Z-Image, https://arxiv.org/abs/2511.22699

    The training shift is not published. For pre-training, the paper names FLUX.1's strategy and
    logit-normal levels. Here, as in diffusers' script, the training shift equals the
    sampling shift, 6.
    """

    title: ClassVar[str] = "Z-Image"
    pipeline: ClassVar[str] = "ZImagePipeline"
    examples: ClassVar[Mapping[str, str]] = {"Z-Image": "Tongyi-MAI/Z-Image"}
    parts: ClassVar[dict[str, str]] = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
    }
    feed_forward: ClassVar[tuple[str, ...]] = ("feed_forward",)
    default_guidance: ClassVar[float] = 5.0
    unconditional: ClassVar[Unconditional] = Unconditional.LAST_ITEMS
    unguided_scale: ClassVar[float] = 0.0
    few_steps: ClassVar[int] = 8  # for Z-Image-Turbo
    undistilled_model: ClassVar[str] = "Z-Image, the model it was distilled from,"
    activations: ClassVar[Activations] = Activations(
        prompt_tokens=64, checkpointed=1, recomputed=37, block=29
    )
    comfyui: ClassVar[ComfyUI | None] = ComfyUI(
        checkpoints={"Tongyi-MAI/Z-Image": "z_image_bf16"},
        text_encoders=("qwen_3_4b",),
        text_encoder_type="lumina2",
        autoencoder="ae",
        shift_node="ModelSamplingAuraFlow",
    )

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        sequences, _ = self.encode_prompts(pipeline, prompts, do_classifier_free_guidance=False)
        return {"sequence": sequences}

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        # The model takes and returns a list of one-frame videos, (c, 1, h, w) each. Its time runs
        # from noise to image, so its velocity has the opposite sign.
        frames = model(list(noisy.unsqueeze(2)), 1 - levels, conditions["sequence"]).sample
        return -torch.stack(frames).squeeze(2)

    def latent_space(self, vae: Any) -> LatentSpace:
        return LatentSpace.from_config(vae, samples_posterior=False)

    def is_distilled(self, pipeline: Any) -> bool:
        # The configuration does not show whether a model is distilled; only the name does.
        return "turbo" in Path(pipeline.name_or_path or "").name.lower()
