"""Held-out loss on a fixed grid of noise and timesteps: a noise-free measure of generalization."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..core.choices import NOISE_LEVELS
from ..core.seeds import generator
from ..run.record import BY_CONCEPT
from ..train.task import inference, loss_by_part
from .latents import Encoder
from .sets import ImageSet
from .visits import Visit, centered_visits

BY_LEVEL = "heldout_loss_by_level/"
"""Stands before a noise level in the name of the loss at it."""


def grid_levels(total: int) -> list[int]:
    """The noise levels of the grid, for a schedule of ``total`` timesteps."""
    levels = range(NOISE_LEVELS)
    return [total * (2 * k + 1) // (2 * NOISE_LEVELS) - total // 40 for k in levels]


class GridImage(NamedTuple):
    """One image of the grid: what is seen of it, its clean latent (c, h, w), and its mask there."""

    visit: Visit
    latent: Tensor
    mask: Tensor | None


class GridLoss:
    """Mean loss over images x noise levels with fixed noise, the same for every run and seed.

    Args:
        task: a `DreamBooth`.
        train: the training images, measured on the same grid so that two runs can be compared at
            equal training loss; None to measure each held-out image instead.
        validation: held-out images.

    ``sets`` has the images of both by the name of their loss.
    """

    def __init__(self, task: Any, train: Any, validation: Any) -> None:
        self.task = task
        self.levels = grid_levels(task.module.denoising.num_timesteps)
        vae = task.pipeline.vae
        space, disk = task.module.family.space(vae), task.encoder.disk
        encoder = Encoder(vae, space, task.device, lambda _: True, disk, task.encoder.cached)
        self.sets = {"heldout_loss": self._load(encoder, validation)}
        if train is not None:
            self.sets["train_grid_loss"] = self._load(encoder, train.images)

    def _load(self, encoder: Encoder, images: ImageSet) -> list[GridImage]:
        grid = []
        for visit in centered_visits(images, self.task.cfg):
            (posterior,) = encoder([visit])
            latent = encoder.space.encode(posterior.mean[None])[0]
            grid.append(GridImage(visit, latent, posterior.mask))
        return grid

    def __call__(self) -> dict[str, float]:
        """``heldout_loss`` and ``train_grid_loss``, each a mean over images and noise levels; and
        ``heldout_loss_by_level/LEVEL`` of each level, a mean over the held-out images, with
        ``heldout_loss_by_concept/NAME`` of the images of each concept; or that of each image
        (`loss_by_part`).
        """
        with inference(self.task.module):
            tables = {name: self.table(images) for name, images in self.sets.items()}
        names = self.task.module.denoising.level(torch.tensor(self.levels)).round().int().tolist()
        held = tables["heldout_loss"]
        levels = zip(names, held.mean(1).tolist(), strict=True)
        means = {name: float(losses.mean(0).mean()) for name, losses in tables.items()}
        if len(tables) == 1:
            return means | loss_by_part(held.mean(0).tolist(), held.shape[1])
        concepts = [image.visit.cfg.concept for image in self.sets["heldout_loss"]]
        for concept in filter(None, dict.fromkeys(concepts)):
            its = torch.tensor([name == concept for name in concepts])
            means[f"{BY_CONCEPT}{concept}"] = float(held[:, its].mean(0).mean())
        return means | {f"{BY_LEVEL}{level}": loss for level, loss in levels}

    def table(self, images: Sequence[GridImage]) -> Tensor:
        """Loss at each noise level of each image, (levels, images)."""
        parts = [
            torch.stack([self.losses(chunk, level) for level in self.levels])
            for chunk in self.batches(images)
        ]
        return torch.cat(parts, dim=1)

    def batches(self, images: Sequence[GridImage]) -> Iterator[Sequence[GridImage]]:
        """As many images at a time as the memory is sure to hold."""
        batch = max(1, 2**18 // self.task.cfg.resolution**2)
        for _, alike in itertools.groupby(images, key=lambda image: image.latent.shape):
            group = list(alike)
            for start in range(0, len(group), batch):
                yield group[start : start + batch]

    def losses(self, images: Sequence[GridImage], level: int) -> Tensor:
        """Loss of each image at one noise level, (images,), on the CPU."""
        latents = torch.stack([image.latent for image in images])
        visits, masks = [image.visit for image in images], [image.mask for image in images]
        random = [generator("grid", visit.name, level) for visit in visits]
        noise = torch.stack([torch.randn(latents[0].shape, generator=each) for each in random])
        index, instance = torch.full((len(images),), level), torch.ones(len(images)).bool()
        inputs = self.task.inputs(latents, noise, index, instance, visits, masks)
        return self.task.module.sample_losses(send_to_device(inputs, self.task.device)).cpu()
