"""Images as latent distributions: encoded once where nothing about them changes, else each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import TrainingError
from .disk_cache import DiskCache
from .families.base import LatentSpace
from .stream import TrainingSample

ENCODING_FIX = "look at the file, or pass another --pretrained_vae_model_name_or_path"
CACHE_FIX = "delete the folder of --disk_cache, or give another"
AT_ONCE = 1024 * 1024
"""Pixels that are encoded together: in float32 a megapixel takes gigabytes."""


class Posterior(NamedTuple):
    """The autoencoder's Gaussian for one image: mean and standard deviation, (c, h, w) each; and
    the image's mask on the same grid, (1, h, w) in [0, 1], if it has one.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None

    def sample(self, generator: torch.Generator) -> Tensor:
        """One sample, (c, h, w), in the autoencoder's own scale."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


def require_finite(name: str, fix: str, *tensors: Tensor) -> None:
    """Refuse an autoencoder's output with numbers that are not finite."""
    if not all(bool(values.isfinite().all()) for values in tensors):
        raise TrainingError(f"{name} is not finite: {fix}.")


class Encoder:
    """Encodes training samples with a frozen autoencoder.

    Args:
        vae: the autoencoder, which comes to the device for the while of encoding.
        space: how its latents are scaled.
        device: where it encodes.
        is_cached: tests that the posterior of a sample is cached, for all samples with the same
            content. These are encoded one by one, so that the result does not depend on what else
            was missing.
        disk: the cache that stays for the next run.
        cache: by content, whichever set it is of; shared by encoders of one autoencoder.
    """

    def __init__(
        self,
        vae: Any,
        space: LatentSpace,
        device: torch.device,
        is_cached: Callable[[TrainingSample], bool] = lambda _: False,
        disk: DiskCache | None = None,
        cache: dict[tuple[str, ...], Posterior] | None = None,
    ) -> None:
        self._vae, self.space, self._device, self._is_cached = vae, space, device, is_cached
        self.cache = {} if cache is None else cache
        self.disk = disk or DiskCache()

    def __call__(self, samples: Sequence[TrainingSample]) -> list[Posterior]:
        """The posterior of each sample, in float32 on the CPU.

        Raises:
            TrainingError: a latent is not finite; the image is named.
        """
        cached = [sample for sample in samples if self._is_cached(sample)]
        uncached = [sample for sample in samples if not self._is_cached(sample)]
        self._fill_cache(cached)
        encoded = iter(self._encode(uncached, AT_ONCE))
        posteriors = []
        for sample in samples:  # in their order
            if self._is_cached(sample):
                posteriors.append(self.cache[sample.content])
            else:
                posteriors.append(next(encoded))
        return posteriors

    def _fill_cache(self, samples: Sequence[TrainingSample]) -> None:
        """Read from the disk, or encode, what is not in the cache."""
        new = {}
        for sample in samples:
            if sample.content not in self.cache:
                new[sample.content] = sample
        for content, sample in new.items():
            if tensors := self.disk.get(*content):
                name = f"the cached latent of the image '{sample.name}'"
                require_finite(name, CACHE_FIX, *tensors.values())
                self.cache[content] = Posterior(**tensors)
        missing = [content for content in new if content not in self.cache]
        # One pixel at once: images are encoded one by one.
        posteriors = self._encode([new[content] for content in missing], 1)
        for content, posterior in zip(missing, posteriors, strict=True):
            self.cache[content] = posterior
            parts = posterior._asdict()
            if posterior.mask is None:
                del parts["mask"]
            self.disk.put(parts, *content)

    @torch.no_grad()
    def _encode(self, samples: Sequence[TrainingSample], pixels_at_once: int) -> list[Posterior]:
        if not samples:
            return []
        vae, home_device = self._vae, self._vae.device
        images, masks = [], []
        for sample in samples:
            image, mask = sample.read()
            images.append(image)
            masks.append(mask)
        pixels = torch.stack(images)  # (n, 3, H, W)
        vae.to(self._device)
        means, stds = [], []
        for part in pixels.split(max(1, pixels_at_once // pixels[0, 0].numel())):
            mean, std = self.space.distribution(vae, part.to(self._device, vae.dtype))
            means.append(mean)
            stds.append(std)
        vae.to(home_device)
        mean = torch.cat(means).float().cpu()  # (n, c, h, w)
        std = torch.cat(stds).float().cpu()
        if not self.space.samples_posterior:  # a latent is the mean
            std = torch.zeros_like(std)
        posteriors = []
        for row, sample in enumerate(samples):
            name = f"the latent of the image '{sample.name}'"
            require_finite(name, ENCODING_FIX, mean[row], std[row])
            mask = masks[row]
            latent_mask = None if mask is None else average_mask(mask, mean)
            posteriors.append(Posterior(mean[row], std[row], latent_mask))
        return posteriors


def weight_map(masks: Sequence[Tensor | None], latents: Tensor, outside: float) -> Tensor:
    """Weights of the latents' places, (n, 1, h, w): 1 within a mask, ``outside`` beyond it.

    Args:
        masks: (1, H, W) in [0, 1] each; None for an image that is learned whole.
        latents: (n, c, h, w).
    """
    full_weight = torch.ones(1, *latents.shape[-2:])
    inside = [full_weight if mask is None else average_mask(mask, latents) for mask in masks]
    return outside + (1 - outside) * torch.stack(inside)


def average_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask (1, H, W) averaged down to the grid of latents (..., h, w): (1, h, w)."""
    return F.adaptive_avg_pool2d(mask, (latents.shape[-2], latents.shape[-1]))
