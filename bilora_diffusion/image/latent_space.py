"""Encoding and scaling of an autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentSpace:
    """Encoding of images by an autoencoder, scaling for the denoiser, and the way back."""

    scale: float  # what centered latents are multiplied with
    mean: Tensor | None = None  # of each channel, (1, c, 1, 1), if the autoencoder has it
    std: Tensor | None = None  # likewise
    shift: float = 0.0  # of all channels
    drawn: bool = True  # latents are drawn from an image's Gaussian; else they are its mean

    @classmethod
    def of(cls, vae: Any, *, drawn: bool = True) -> Self:
        """Read the scaling from the autoencoder's configuration."""

        def per_channel(name: str) -> Tensor | None:
            values = getattr(vae.config, name, None)
            return None if values is None else torch.tensor(values).view(1, -1, 1, 1)

        mean, std = per_channel("latents_mean"), per_channel("latents_std")
        if (mean is None) != (std is None):
            raise ValueError("its autoencoder has one of latents_mean and latents_std alone")
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = getattr(vae.config, "scaling_factor", None) or 1.0
        return cls(scale, mean, std, shift, drawn)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them, (n, c, h, w)."""
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.scale
        return (latents - self.mean.to(latents)) * self.scale / self.std.to(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder sees them, (n, c, h, w)."""
        if self.mean is None or self.std is None:
            return latents / self.scale + self.shift
        return latents * self.std.to(latents) / self.scale + self.mean.to(latents)

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images (n, 3, H, W), (n, c, h, w) each."""
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] of latents as the autoencoder sees them."""
        return vae.decode(latents).sample
