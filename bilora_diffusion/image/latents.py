"""Images as latent distributions: encoded once where nothing about them changes, else per visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TrainingError
from .disk_cache import DiskCache
from .latent_space import LatentSpace
from .masks import at_size
from .visits import Visit

ENCODED = "look at the file, or pass another --pretrained_vae_model_name_or_path"
KEPT = "delete the folder of --disk_cache, or give another"
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
    """Refuse what an autoencoder gives that has numbers which are none.

    Raises:
        TrainingError: it names what and the fix.
    """
    if not all(bool(values.isfinite().all()) for values in tensors):
        raise TrainingError(f"{what} is not finite: {fix}.")


class Encoder:
    """Encodes visits with a frozen autoencoder.

    Args:
        vae: the autoencoder, which comes to the device for the while of encoding.
        space: how its latents are scaled.
        device: where it encodes.
        keeps: of which visits the posterior is kept, for all others that see the same. These are
            encoded one by one, so that the result does not depend on what else was lacking.
        disk: where what is kept stays for the next run.
        kept: by what is seen, whichever set it is of; shared by encoders of one autoencoder.
    """

    def __init__(
        self,
        vae: Any,
        space: LatentSpace,
        device: torch.device,
        keeps: Callable[[Visit], bool] = lambda _: False,
        disk: DiskCache | None = None,
        kept: dict[tuple[str, ...], Posterior] | None = None,
    ) -> None:
        self._vae, self.space, self._device, self._keeps = vae, space, device, keeps
        self.kept = {} if kept is None else kept
        self.disk = disk or DiskCache()

    def __call__(self, visits: Sequence[Visit]) -> list[Posterior]:
        """The posterior of each visit, in float32 on the CPU.

        Raises:
            TrainingError: a latent is not finite; the image is named.
        """
        self._keep([visit for visit in visits if self._keeps(visit)])
        passing = iter(self._encoded([v for v in visits if not self._keeps(v)], AT_ONCE))
        return [self.kept[v.content] if self._keeps(v) else next(passing) for v in visits]

    def _keep(self, visits: Sequence[Visit]) -> None:
        new = {v.content: v for v in visits if v.content not in self.kept}
        for content, visit in new.items():
            if parts := self.disk.get(*content):
                require_finite(
                    f"the kept latent of the image '{visit.name}'", KEPT, *parts.values()
                )
                self.kept[content] = Posterior(**parts)
        lacking = [content for content in new if content not in self.kept]
        encoded = self._encoded([new[content] for content in lacking], 1)
        for content, made in zip(lacking, encoded, strict=True):
            self.kept[content] = made
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
