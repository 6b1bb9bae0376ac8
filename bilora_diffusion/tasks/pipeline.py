"""The frozen parts of a Stable Diffusion XL pipeline, loaded once and kept by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..mini import pipeline_dir

MINI = "mini"


def resolve(name: str) -> str:
    """The folder or hub id that a model name stands for; ``mini`` is the embedded miniature."""
    return str(pipeline_dir()) if name == MINI else name


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype | dict[str, torch.dtype],
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
) -> StableDiffusionXLPipeline:
    """Load a genuine SDXL pipeline with its VAE in float32 and everything else in ``dtype``.

    Args:
        name: folder, hub id, or ``mini``.
        dtype: of all parts, or of each by name with "default" for the rest.
        vae: another autoencoder (``--pretrained_vae_model_name_or_path``).

    Raises:
        UserError: nothing that can be loaded is there.
    """
    where = resolve(name)
    shared: dict[str, Any] = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    if where != name:
        shared = {}
    # The SDXL autoencoder overflows in half precision, so latents are made and decoded in float32.
    try:
        autoencoder = (
            AutoencoderKL.from_pretrained(vae, dtype=torch.float32, cache_dir=cache_dir)
            if vae
            else AutoencoderKL.from_pretrained(
                where, subfolder="vae", dtype=torch.float32, **shared
            )
        )
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            where, vae=autoencoder, dtype=dtype, add_watermarker=False, **shared
        )
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load(name, vae, error)) from error
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False)
        module.eval()
    return pipeline


def _cannot_load(name: str, vae: str | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    kind = "folder" if Path(name).exists() else "hub id (or folder)"
    extra = f" with the autoencoder '{vae}'" if vae else ""
    return (
        f"the base model '{name}'{extra} cannot be loaded ({reason}): pass"
        f" --pretrained_model_name_or_path a {kind} of a Stable Diffusion XL pipeline,"
        " or 'mini' for the embedded miniature."
    )


def quiet() -> None:
    """Keep the libraries' loading bars and notices out of the training output."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@dataclass(frozen=True)
class LatentSpace:
    """How an autoencoder's latents are scaled for the denoiser (and back)."""

    scale: float
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    @classmethod
    def of(cls, vae: AutoencoderKL) -> LatentSpace:
        """Read the scaling from the autoencoder's configuration."""
        config: Any = vae.config

        def per_channel(name: str) -> torch.Tensor | None:
            values = getattr(config, name, None)
            return None if values is None else torch.tensor(values).view(1, -1, 1, 1)

        return cls(config.scaling_factor, per_channel("latents_mean"), per_channel("latents_std"))

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser sees them, (n, c, h, w)."""
        if self.mean is None or self.std is None:
            return latents * self.scale
        mean, std = self.mean.to(latents), self.std.to(latents)
        return (latents - mean) * self.scale / std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder sees them, (n, c, h, w)."""
        if self.mean is None or self.std is None:
            return latents / self.scale
        mean, std = self.mean.to(latents), self.std.to(latents)
        return latents * std / self.scale + mean
