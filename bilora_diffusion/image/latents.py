"""Images as latent distributions: encoded once where nothing about them changes, else per visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TrainingError
from .pipeline import LatentSpace


class Posterior(NamedTuple):
    """The autoencoder's Gaussian for one image: mean and standard deviation, (c, h, w) each."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw, (c, h, w), in the autoencoder's own scale."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


class Encoder:
    """Encodes pixel tensors with a frozen autoencoder, in float32.

    Args:
        vae: the autoencoder, already on its device.
        device: where the pixels are moved to.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self._vae, self._device = vae, device
        self.space = LatentSpace.of(vae)

    @torch.no_grad()
    def __call__(self, pixels: Sequence[Tensor], names: Sequence[str]) -> list[Posterior]:
        """Posteriors of images, (3, R, R) in [-1, 1] each, on the CPU.

        Raises:
            TrainingError: a latent is not finite; the image is named.
        """
        batch = torch.stack(list(pixels)).to(self._device, self._vae.dtype)
        distribution = self._vae.encode(batch).latent_dist
        mean, std = distribution.mean.float().cpu(), distribution.std.float().cpu()
        for row, name in enumerate(names):
            if not (torch.isfinite(mean[row]).all() and torch.isfinite(std[row]).all()):
                raise TrainingError(
                    f"the autoencoder gives a non-finite latent for the image '{name}': look at"
                    " the file, or pass another --pretrained_vae_model_name_or_path."
                )
        return [Posterior(mean[row], std[row]) for row in range(len(names))]


class LatentCache:
    """Posteriors by key (sample, crop, flip), each encoded at its first visit and kept."""

    def __init__(self, encoder: Encoder, keep: bool) -> None:
        self._encoder, self._keep = encoder, keep
        self.space = encoder.space
        self._known: dict[tuple[Any, ...], Posterior] = {}

    def __call__(
        self,
        keys: Sequence[tuple[Any, ...]],
        pixels: Callable[[int], Tensor],
        names: Sequence[str],
    ) -> list[Posterior]:
        """Posteriors for ``keys``; ``pixels(row)`` is asked only for those not known yet."""
        new = [row for row, key in enumerate(keys) if key not in self._known]
        fresh: dict[tuple[Any, ...], Posterior] = {}
        if new:
            encoded = self._encoder([pixels(row) for row in new], [names[row] for row in new])
            fresh = {keys[row]: value for row, value in zip(new, encoded, strict=True)}
        if self._keep:
            self._known |= fresh
        return [fresh[key] if key in fresh else self._known[key] for key in keys]
