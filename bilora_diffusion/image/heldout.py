"""Held-out loss on a fixed grid of noise and timesteps: a noise-free measure of generalization."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..choices import NOISE_LEVELS
from ..run.record import BY_CONCEPT
from ..seeds import generator
from ..train.task import inference, loss_by_part
from .config import DreamBoothConfig
from .latents import Encoder
from .sets import ImageSet
from .visits import centered_visits

BY_LEVEL = "heldout_loss_by_level/"
"""Stands before a noise level in the name of the loss at it."""


def grid_levels(total: int) -> list[int]:
    """The noise levels of the grid, for a schedule of ``total`` timesteps."""
    levels = range(NOISE_LEVELS)
    return [total * (2 * k + 1) // (2 * NOISE_LEVELS) - total // 40 for k in levels]


class Conditioned(Protocol):
    """The part of a task that the grid needs."""

    module: Any
    device: torch.device
    cfg: DreamBoothConfig
    encoder: Encoder

    def inputs(
        self, latents: Any, noise: Any, index: Any, instance: Any, images: Any, masks: Any
    ) -> dict[str, Any]:
        """A module's inputs for some images."""
        ...

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline."""
        ...


@dataclass(frozen=True)
class GridImage:
    """One image of the grid: its clean latent (c, h, w), caption, micro-conditioning, mask and the
    name of its concept.
    """

    name: str
    latent: Tensor
    caption: str
    time_ids: tuple[float, ...]
    mask: Tensor | None = None
    concept: str = ""


class GridLoss:
    """Mean loss over images x noise levels with fixed noise, the same for every run and seed.

    Args:
        task: gives the module, the text conditioning and the autoencoder.
        train: the training images, measured on the same grid so that two runs can be compared at
            equal training loss; None to measure each held-out image instead.
        validation: held-out images.

    ``sets`` has the images of both by the name of their loss.
    """

    def __init__(self, task: Conditioned, train: Any, validation: Any) -> None:
        self.task = task
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
            about = visit.caption, visit.time_ids, posterior.mask, visit.cfg.concept
            grid.append(GridImage(visit.name, latent, *about))
        return grid

    def __call__(self) -> dict[str, float]:
        """``heldout_loss`` and ``train_grid_loss``, each a mean over images and noise levels; and
        ``heldout_loss_by_level/LEVEL`` of each level, a mean over the held-out images, with
        ``heldout_loss_by_concept/NAME`` of the images of each concept; or that of each image
        (`loss_by_part`).
        """
        with inference(self.task.module):
            tables = {name: self.table(images) for name, images in self.sets.items()}
        names = self.task.module.denoising.level(torch.tensor(self._known())).round().int().tolist()
        held = tables["heldout_loss"]
        levels = zip(names, held.mean(1).tolist(), strict=True)
        means = {name: float(losses.mean(0).mean()) for name, losses in tables.items()}
        if len(tables) == 1:
            return means | loss_by_part(held.mean(0).tolist(), held.shape[1])
        concepts = [image.concept for image in self.sets["heldout_loss"]]
        for concept in filter(None, dict.fromkeys(concepts)):
            its = torch.tensor([name == concept for name in concepts])
            means[f"{BY_CONCEPT}{concept}"] = float(held[:, its].mean(0).mean())
        return means | {f"{BY_LEVEL}{level}": loss for level, loss in levels}

    def _known(self) -> list[int]:
        return grid_levels(self.task.module.denoising.num_timesteps)

    def table(self, images: Sequence[GridImage]) -> Tensor:
        """Loss at each noise level of each image, (levels, images)."""
        parts = [
            torch.stack([self.losses(chunk, level) for level in self._known()])
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
        noise = torch.stack(
            [
                torch.randn(image.latent.shape, generator=generator("grid", image.name, level))
                for image in images
            ]
        )
        index, instance = torch.full((len(images),), level), torch.ones(len(images)).bool()
        masks = [image.mask for image in images]
        inputs = self.task.inputs(latents, noise, index, instance, images, masks)
        return self.task.module.sample_losses(send_to_device(inputs, self.task.device)).cpu()
