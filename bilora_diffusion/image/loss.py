"""The trained models with their loss on a micro-batch, and the held-out loss.

The held-out loss is measured on a fixed grid of noise and timesteps: a noise-free measure of
generalization.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .. import adapters
from ..core.seeds import generator
from ..core.values import NOISE_LEVELS
from ..run.record import BY_CONCEPT
from ..train.task import inference, loss_by_part, precision
from .families.base import Conditions, Family, move
from .families.sdxl import encode
from .latents import Encoder
from .noise_schedules import NoiseSchedule
from .sets import ImageSet
from .stream import TrainingSample, centered_samples

PRIOR, UNCONDITIONAL = "prior", "unconditional"
"""Inputs that are conditions of further predictions: for the class's prompt, and for what guidance
leads away from.
"""
OTHER_INPUTS = frozenset(
    ("latents", "noise", "index", "instance", "mask_weights", PRIOR, UNCONDITIONAL)
)
"""Inputs that are not conditions of the images' own captions."""
BY_LEVEL = "heldout_loss_by_level/"
"""Stands before a noise level in the name of the loss at it."""
HELDOUT, TRAINING = "heldout_loss", "train_grid_loss"
PIXELS_AT_ONCE = 2**18
"""Pixels of the images that are measured together; memory is sure to hold them."""


class DreamBoothModule(nn.Module):
    """The trained models and their loss.

    ``forward`` takes a micro-batch's inputs: ``latents`` and ``noise`` (n, c, h, w), ``index`` and
    ``instance`` (n,), ``time_ids`` (n, 6), with masks ``mask_weights`` (n, 1, h, w), and either the
    family's conditions or, where the text encoders are trained, ``ids`` (two tensors (n, tokens))
    and ``has_text`` (n,), False where zeros stand for the text.
    The first rows are instance images; with prior preservation as many class images follow. It
    returns (slots,): the instance loss plus ``prior_loss_weight`` times the class loss, plus
    ``prior_prediction_weight`` times the `departures` for the conditions `PRIOR` and
    ``hold_unconditional`` times those for the conditions `UNCONDITIONAL`, where the inputs have
    them, both of the instance images.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        denoising: NoiseSchedule,
        prior_loss_weight: float | None = None,
        prior_prediction_weight: float = 0.0,
        hold_unconditional: float = 0.0,
    ) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleList(text_encoders)
        self.denoising = denoising
        self.prior_loss_weight = prior_loss_weight
        self.departure_weights = {PRIOR: prior_prediction_weight, UNCONDITIONAL: hold_unconditional}
        self._adapted: list[adapters.LoraLayer] | None = None

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """One loss per slot, (slots,), in float32."""
        losses = self.sample_losses(inputs)  # (n,)
        if self.prior_loss_weight is not None:
            instance, prior = losses.chunk(2)  # (slots,) each
            losses = instance + self.prior_loss_weight * prior
        for name, weight in self.departure_weights.items():
            if name in inputs:
                noisy, levels = self.denoising.add_noise(inputs)
                departures = self.departures(inputs, name, noisy, levels)  # (n,)
                losses = losses + weight * departures[: len(losses)]
        return losses

    def departures(
        self, inputs: dict[str, Any], name: str, noisy: Tensor, levels: Tensor
    ) -> Tensor:
        """Mean square by which the adapters change what is predicted for the conditions of a name,
        `PRIOR` or `UNCONDITIONAL`, at the same noisy latents: (n,) in float32.

        All adapters act that act in the loss, an auxiliary too: it perturbs the whole loss, and
        with gradient checkpointing a layer is computed again after this function. Class images are
        among the rows, since an auxiliary for each sample goes by the rows of the micro-batch.
        """
        conditions = {**inputs[name], "time_ids": inputs["time_ids"]}
        if self._adapted is None:
            # Found once: the walk over all modules takes time.
            self._adapted = []
            for model in (self.denoiser, *self.text_encoders):
                self._adapted += [layer for _, layer in adapters.layers(model)]
        with torch.no_grad(), adapters.off(self._adapted):
            before = self._predict(conditions, noisy, levels).float()
        after = self._predict(conditions, noisy, levels).float()
        return (after - before).square().flatten(1).mean(dim=1)

    def _predict(self, conditions: Conditions, noisy: Tensor, levels: Tensor) -> Tensor:
        """The denoiser's prediction, (n, c, h, w), for conditions that may be token ids yet."""
        if "ids" in conditions:
            encoded = self._encode(conditions["ids"], conditions["has_text"])
            conditions = {**encoded, "time_ids": conditions["time_ids"]}
        dtype = precision(self.denoiser)
        conditions = move(conditions, noisy.device, dtype)
        return self.family.predict(self.denoiser, noisy.to(dtype), levels, conditions)

    def _encode(self, ids: Sequence[Tensor], has_text: Tensor) -> Conditions:
        """Embeddings of token ids by the trained encoders, zeros where ``has_text`` is False."""
        conditions = {}
        for name, values in encode(list(self.text_encoders), ids).items():
            rows = has_text.view(-1, *[1] * (values.ndim - 1))  # (n, 1, ...)
            conditions[name] = values.where(rows, 0.0)
        return conditions

    def sample_losses(self, inputs: dict[str, Any]) -> Tensor:
        """One loss per row, (n,), in float32, of instance and class images alike."""
        conditions = {k: values for k, values in inputs.items() if k not in OTHER_INPUTS}
        noisy, levels = self.denoising.add_noise(inputs)  # (n, c, h, w), (n,)
        # The loss is in float32, the denoiser in the dtype of its weights.
        return self.denoising.loss(self._predict(conditions, noisy, levels), inputs)


def grid_levels(total: int) -> list[int]:
    """The noise levels of the grid, for a schedule of ``total`` timesteps: the middle of each of
    `NOISE_LEVELS` equal parts, brought down by a fortieth of the whole.
    """
    levels = range(NOISE_LEVELS)
    return [total * (2 * k + 1) // (2 * NOISE_LEVELS) - total // 40 for k in levels]


class GridImage(NamedTuple):
    """One image of the grid: its sample, its clean latent (c, h, w), and its mask there."""

    sample: TrainingSample
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
        space, disk = task.module.family.latent_space(vae), task.encoder.disk
        encoder = Encoder(vae, space, task.device, lambda _: True, disk, task.encoder.cache)
        self.sets = {HELDOUT: self._load(encoder, validation)}
        if train is not None:
            self.sets[TRAINING] = self._load(encoder, train.images)

    def _load(self, encoder: Encoder, images: ImageSet) -> list[GridImage]:
        grid = []
        for sample in centered_samples(images, self.task.cfg):
            (posterior,) = encoder([sample])
            # The mean of the posterior: nothing about the grid is random.
            latent = encoder.space.encode(posterior.mean[None])[0]
            grid.append(GridImage(sample, latent, posterior.mask))
        return grid

    def __call__(self) -> dict[str, float]:
        """``heldout_loss`` and ``train_grid_loss``, each a mean over images and noise levels; and
        ``heldout_loss_by_level/LEVEL`` of each level, a mean over the held-out images, with
        ``heldout_loss_by_concept/NAME`` of the images of each concept; or that of each image
        (`loss_by_part`).
        """
        with inference(self.task.module):
            tables = {name: self.table(images) for name, images in self.sets.items()}
        heldout = tables[HELDOUT]  # (levels, images)
        # First over the levels, then over the images, as the means by concept are.
        losses = {name: float(table.mean(0).mean()) for name, table in tables.items()}
        if TRAINING not in tables:
            return losses | loss_by_part(heldout.mean(0).tolist(), heldout.shape[1])
        concepts = [image.sample.cfg.concept for image in self.sets[HELDOUT]]
        for concept in filter(None, dict.fromkeys(concepts)):
            is_of_concept = torch.tensor([name == concept for name in concepts])
            losses[f"{BY_CONCEPT}{concept}"] = float(heldout[:, is_of_concept].mean(0).mean())
        names = self.task.module.denoising.level(torch.tensor(self.levels)).round().int().tolist()
        for name, loss in zip(names, heldout.mean(1).tolist(), strict=True):
            losses[f"{BY_LEVEL}{name}"] = loss
        return losses

    def table(self, images: Sequence[GridImage]) -> Tensor:
        """Loss at each noise level of each image, (levels, images)."""
        parts = []
        for batch in self.batches(images):
            parts.append(torch.stack([self.losses(batch, level) for level in self.levels]))
        return torch.cat(parts, dim=1)

    def batches(self, images: Sequence[GridImage]) -> Iterator[Sequence[GridImage]]:
        """Images of one shape, as many at a time as the memory is sure to hold."""
        size = max(1, PIXELS_AT_ONCE // self.task.cfg.resolution**2)
        for _, group in itertools.groupby(images, key=lambda image: image.latent.shape):
            same_shape = list(group)
            for start in range(0, len(same_shape), size):
                yield same_shape[start : start + size]

    def losses(self, images: Sequence[GridImage], level: int) -> Tensor:
        """Loss of each image at one noise level, (images,), on the CPU."""
        samples, masks = [image.sample for image in images], [image.mask for image in images]
        latents = torch.stack([image.latent for image in images])  # (n, c, h, w)
        noise = []
        for sample in samples:  # by name: the same noise in every run and set
            random = generator("grid", sample.name, level)
            noise.append(torch.randn(latents[0].shape, generator=random))
        index, instance = torch.full((len(images),), level), torch.ones(len(images)).bool()
        inputs = self.task.inputs(latents, torch.stack(noise), index, instance, samples, masks)
        return self.task.module.sample_losses(send_to_device(inputs, self.task.device)).cpu()
