"""Images as latent distributions: encoded once where nothing about them changes, else per visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import TrainingError
from .disk_cache import DiskCache
from .latent_space import LatentSpace
from .visits import Visit

ENCODED = "look at the file, or pass another --pretrained_vae_model_name_or_path"
CACHED = "delete the folder of --disk_cache, or give another"
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
        """One draw, (c, h, w), in the autoencoder's own scale."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


def require_finite(what: str, fix: str, *tensors: Tensor) -> None:
    """Refuse what an autoencoder gives that has numbers which are none."""
    if not all(bool(values.isfinite().all()) for values in tensors):
        raise TrainingError(f"{what} is not finite: {fix}.")


class Encoder:
    """Encodes visits with a frozen autoencoder.

    Args:
        vae: the autoencoder, which comes to the device for the while of encoding.
        space: how its latents are scaled.
        device: where it encodes.
        caches: tests that the posterior of a draw is cached, for all others that see the same.
            These are encoded one by one, so that the result does not depend on what else was
            missing.
        disk: the cache that stays for the next run.
        cached: by content, whichever set it is of; shared by encoders of one autoencoder.
    """

    def __init__(
        self,
        vae: Any,
        space: LatentSpace,
        device: torch.device,
        caches: Callable[[Visit], bool] = lambda _: False,
        disk: DiskCache | None = None,
        cached: dict[tuple[str, ...], Posterior] | None = None,
    ) -> None:
        self._vae, self.space, self._device, self._caches = vae, space, device, caches
        self.cached = {} if cached is None else cached
        self.disk = disk or DiskCache()

    def __call__(self, visits: Sequence[Visit]) -> list[Posterior]:
        """The posterior of each visit, in float32 on the CPU.

        Raises:
            TrainingError: a latent is not finite; the image is named.
        """
        self._fill([visit for visit in visits if self._caches(visit)])
        passing = iter(self._encoded([v for v in visits if not self._caches(v)], AT_ONCE))
        return [self.cached[v.content] if self._caches(v) else next(passing) for v in visits]

    def _fill(self, visits: Sequence[Visit]) -> None:
        new = {v.content: v for v in visits if v.content not in self.cached}
        for content, visit in new.items():
            if parts := self.disk.get(*content):
                require_finite(
                    f"the cached latent of the image '{visit.name}'", CACHED, *parts.values()
                )
                self.cached[content] = Posterior(**parts)
        missing = [content for content in new if content not in self.cached]
        encoded = self._encoded([new[content] for content in missing], 1)
        for content, made in zip(missing, encoded, strict=True):
            self.cached[content] = made
            there = {name: part for name, part in made._asdict().items() if part is not None}
            self.disk.put(there, *content)

    @torch.no_grad()
    def _encoded(self, visits: Sequence[Visit], at_once: int) -> list[Posterior]:
        if not visits:
            return []
        vae, home = self._vae, self._vae.device
        images, masks = zip(*(visit.read() for visit in visits), strict=True)
        pixels = torch.stack(images)
        vae.to(self._device)
        parts = [
            self.space.distribution(vae, part.to(self._device, vae.dtype))
            for part in pixels.split(max(1, at_once // pixels[0, 0].numel()))
        ]
        mean, std = (torch.cat(side).float().cpu() for side in zip(*parts, strict=True))
        vae.to(home)
        if not self.space.drawn:
            std = torch.zeros_like(std)
        for row, visit in enumerate(visits):
            require_finite(f"the latent of the image '{visit.name}'", ENCODED, mean[row], std[row])
        shown = [None if mask is None else at_size(mask, mean) for mask in masks]
        return [Posterior(*parts) for parts in zip(mean, std, shown, strict=True)]


def weight_map(masks: Sequence[Tensor | None], like: Tensor, outside: float) -> Tensor:
    """Weights of the latents' places, (n, 1, h, w): 1 within a mask, ``outside`` beyond it.

    Args:
        masks: (1, H, W) in [0, 1] each; None for an image that is learned whole.
        like: latents, (n, c, h, w).
    """
    whole = torch.ones(1, *like.shape[-2:])
    shown = [whole if mask is None else at_size(mask, like) for mask in masks]
    return outside + (1 - outside) * torch.stack(shown)


def at_size(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (1, H, W) averaged down to the grid of latents (..., h, w): (1, h, w)."""
    return F.adaptive_avg_pool2d(mask, (like.shape[-2], like.shape[-1]))
