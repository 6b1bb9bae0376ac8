"""Latent distributions of images, which can be cached if an image always has the same crop."""

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

ENCODING_FIX = "check the file, or pass another --pretrained_vae_model_name_or_path"
CACHE_FIX = "delete the folder of --disk_cache, or give another one"
# Maximum number of pixels to encode at a time; a larger image is encoded alone. In float32, in
# which autoencoders compute, a megapixel takes gigabytes of memory.
AT_ONCE = 1024 * 1024


class Posterior(NamedTuple):
    """The Gaussian that the autoencoder computes for one image, in the autoencoder's scale."""

    mean: Tensor  # (c, h, w)
    std: Tensor  # (c, h, w)
    mask: Tensor | None = None  # image mask on the grid of the latent, (1, h, w) in [0, 1]

    def sample(self, generator: torch.Generator) -> Tensor:
        """Sample a latent, (c, h, w)."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


def require_finite(name: str, fix: str, *tensors: Tensor) -> None:
    """Raise TrainingError if an autoencoder's output is not finite."""
    if not all(bool(values.isfinite().all()) for values in tensors):
        raise TrainingError(f"{name} is not finite: {fix}.")


class Encoder:
    """An encoder of training samples that uses a frozen autoencoder.

    Args:
        vae: the autoencoder, which is moved to the device while it encodes.
        space: scale of the latents, and how the autoencoder encodes.
        device: device to encode on.
        is_cached: function that returns whether a sample's posterior is encoded once and shared by
            all samples with the same content. Such posteriors are encoded one at a time, so they do
            not depend on which other samples were missing from the cache.
        disk: cache on disk, for later runs.
        cache: posteriors in memory, by the content of the samples. Encoders with the same
            autoencoder can share it.
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
        self._vae = vae
        self.space = space
        self._device = device
        self._is_cached = is_cached
        self.disk = disk or DiskCache()
        self.cache: dict[tuple[str, ...], Posterior] = {}
        if cache is not None:
            self.cache = cache

    def __call__(self, samples: Sequence[TrainingSample]) -> list[Posterior]:
        """Return the posterior of each sample, in float32 on the CPU.

        Raises:
            UserError: an image can't be read, or its size has changed since the set was opened.
            TrainingError: a latent is not finite; the message names the image.
        """
        cached, uncached = [], []
        for sample in samples:
            if self._is_cached(sample):
                cached.append(sample)
            else:
                uncached.append(sample)
        self._fill_cache(cached)
        encoded = iter(self._encode(uncached, AT_ONCE))
        posteriors = []
        for sample in samples:
            if self._is_cached(sample):
                posteriors.append(self.cache[sample.content])
            else:
                posteriors.append(next(encoded))
        return posteriors

    def _fill_cache(self, samples: Sequence[TrainingSample]) -> None:
        """Fill the cache in memory: read missing posteriors from disk, or encode the images."""
        missing: dict[tuple[str, ...], TrainingSample] = {}
        for sample in samples:
            content = sample.content
            if content in self.cache or content in missing:
                continue
            if tensors := self.disk.get(*content):
                name = f"the cached latent of the image '{sample.name}'"
                require_finite(name, CACHE_FIX, *tensors.values())
                self.cache[content] = Posterior(**tensors)
            else:
                missing[content] = sample
        # With a limit of one pixel, the images are encoded one at a time.
        posteriors = self._encode(list(missing.values()), pixels_at_once=1)
        for content, posterior in zip(missing, posteriors, strict=True):
            self.cache[content] = posterior
            tensors = posterior._asdict()
            if posterior.mask is None:
                del tensors["mask"]
            self.disk.put(tensors, *content)

    @torch.no_grad()
    def _encode(self, samples: Sequence[TrainingSample], pixels_at_once: int) -> list[Posterior]:
        """Encode images of the same size, at most ``pixels_at_once`` or one image per batch."""
        if not samples:
            return []
        vae = self._vae
        home_device = vae.device
        images, masks = [], []
        for sample in samples:
            image, mask = sample.read()
            images.append(image)
            masks.append(mask)
        pixels = torch.stack(images)  # (n, 3, H, W)
        images_at_once = max(1, pixels_at_once // pixels[0, 0].numel())

        vae.to(self._device)
        means, stds = [], []
        for part in pixels.split(images_at_once):
            mean, std = self.space.distribution(vae, part.to(self._device, vae.dtype))
            means.append(mean)
            stds.append(std)
        vae.to(home_device)

        mean = torch.cat(means).float().cpu()  # (n, c, h, w)
        std = torch.cat(stds).float().cpu()  # (n, c, h, w)
        if not self.space.samples_posterior:  # the latent is the mean, not a sample
            std = torch.zeros_like(std)
        posteriors = []
        for row, sample in enumerate(samples):
            name = f"the latent of the image '{sample.name}'"
            require_finite(name, ENCODING_FIX, mean[row], std[row])
            mask = masks[row]
            if mask is not None:
                mask = average_mask(mask, mean)
            posteriors.append(Posterior(mean[row], std[row], mask))
        return posteriors


def weight_map(masks: Sequence[Tensor | None], latents: Tensor, outside: float) -> Tensor:
    """Return the weights of the loss, (n, 1, h, w): 1 where a mask is 1, ``outside`` where it is 0.

    Args:
        masks: one for each image, (1, H, W) in [0, 1]; None for an image without a mask.
        latents: the latents, (n, c, h, w), for their height and width.
        outside: weight where a mask is 0; for values between 0 and 1, weights are interpolated.
    """
    inside = []
    for mask in masks:
        if mask is None:
            inside.append(torch.ones(1, *latents.shape[-2:]))
        else:
            inside.append(average_mask(mask, latents))
    return outside + (1 - outside) * torch.stack(inside)


def average_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """Average a mask, (1, H, W), down to (1, h, w), the size of ``latents``, (..., h, w)."""
    return F.adaptive_avg_pool2d(mask, (latents.shape[-2], latents.shape[-1]))
