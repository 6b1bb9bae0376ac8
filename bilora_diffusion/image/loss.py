"""The training loss, in a module that holds the trained models, and the held-out loss.

With ``--guided_target S`` the adapters learn the prediction of classifier-free guidance at scale S,
computed with the base model's unconditional prediction u. The target of a prediction p is

    target + (1 - 1/S) (p - u),  without gradient through p and u.

Its fixed point is p = u + S (target - u); see "The guided target" in docs/methods.md.

The held-out loss is measured on a fixed grid of noise levels with fixed noise, so two measurements
differ only if the weights differ. It always uses the plain target.
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
from ..core.values import BY_LEVEL, HELDOUT_LOSS, NOISE_LEVELS, TRAINING_GRID_LOSS
from ..run.record import BY_CONCEPT
from ..train.task import inference, precision
from .families.base import Family
from .families.sdxl import encode
from .families.tensors import Conditions, move
from .latents import Encoder
from .noise_schedules import NoiseSchedule
from .sets import ImageSet
from .stream import TrainingSample, centered_samples

# Names of the inputs with the conditions of the class prompt and of the empty prompt.
PRIOR, UNCONDITIONAL = "prior", "unconditional"
# Name of the input with the weights of the loss terms that keep predictions close to those of the
# base model: a mapping from `PRIOR` or `UNCONDITIONAL` to (n,).
HELD_WEIGHTS = "held_weights"
# Name of the input for the guided target, (n,): 1 - 1/S, or 0 for a row with the plain target.
GUIDANCE_SHARE = "guidance_share"
# Names of all inputs except the conditions of the images' own captions.
NO_CONDITIONS = frozenset(
    (
        "latents",
        "noise",
        "level_index",
        "is_instance",
        "mask_weights",
        PRIOR,
        UNCONDITIONAL,
        HELD_WEIGHTS,
        GUIDANCE_SHARE,
    )
)
# Approximate number of pixels per batch of the held-out loss; a larger image is a batch of its own.
PIXELS_AT_ONCE = 2**18


class DreamBoothModule(nn.Module):
    """The trained models and their loss.

    ``forward`` takes the inputs of a micro-batch with n rows: instance images, followed by the same
    number of class images if the run has prior preservation.

    - ``latents`` and ``noise``, (n, c, h, w)
    - ``level_index``, the index of the noise level, (n,)
    - ``is_instance``, False for a class image, (n,)
    - ``time_ids``, (n, 6), and with masks ``mask_weights``, (n, 1, h, w)
    - the family's conditions or, if the text encoders are trained, ``ids``, two tensors
      (n, tokens), and ``has_text``, (n,), False where zeros replace the embeddings
    - `PRIOR` and `UNCONDITIONAL`, conditions of the class prompt and of the empty prompt, in runs
      and steps that use them
    - `GUIDANCE_SHARE`, (n,), with a guided target; it requires `UNCONDITIONAL`
    - `HELD_WEIGHTS`, weights (n,) by prompt, in steps that keep predictions close to those of the
      base model

    The loss of a slot is the loss of its instance image, plus ``prior_loss_weight`` times the loss
    of its class image. Each held prompt adds its weight times the mean squared change that the
    adapters make to the prediction for this prompt on the instance image.

    Args:
        family: the family of the base model, which calls the denoiser.
        denoiser: the UNet or transformer that is trained; it may have adapters.
        text_encoders: the trained text encoders; () if they are frozen.
        noise_schedule: noise levels and the loss of a prediction.
        prior_loss_weight: weight of the class images; None if there are none.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        noise_schedule: NoiseSchedule,
        prior_loss_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleList(text_encoders)
        self.noise_schedule = noise_schedule
        self.prior_loss_weight = prior_loss_weight
        self._adapted: list[adapters.LoraLayer] | None = None

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """Return one loss per slot, (slots,), in float32."""
        noisy, levels = self.noise_schedule.add_noise(inputs)  # (n, c, h, w), (n,)
        prediction = self._predict(caption_conditions(inputs), noisy, levels)
        base_predictions: dict[str, Tensor] = {}  # by prompt, (n, c, h, w) each
        for prompt in (PRIOR, UNCONDITIONAL):
            if prompt in inputs:
                conditions = prompt_conditions(inputs, prompt)
                base_predictions[prompt] = self.base_prediction(conditions, noisy, levels)
        if GUIDANCE_SHARE in inputs:
            share = inputs[GUIDANCE_SHARE].view(-1, 1, 1, 1)  # 1 - 1/S
            # (prediction - share * change) - target = prediction - (target + share * change): the
            # plain loss of the result is the loss of the prediction for the guided target.
            prediction = prediction.float()
            change = prediction.detach() - base_predictions[UNCONDITIONAL]
            prediction = prediction - share * change
        losses = self.noise_schedule.loss(prediction, inputs)  # (n,), in float32

        if self.prior_loss_weight is not None:
            instance, prior = losses.chunk(2)  # (slots,) each
            losses = instance + self.prior_loss_weight * prior
        for prompt, weights in inputs.get(HELD_WEIGHTS, {}).items():
            conditions = prompt_conditions(inputs, prompt)
            changes = self.squared_change(conditions, noisy, levels, base_predictions[prompt])
            # Only the first rows count, which are the instance images.
            losses = losses + (weights * changes)[: len(losses)]
        return losses

    def base_prediction(self, conditions: Conditions, noisy: Tensor, levels: Tensor) -> Tensor:
        """Return the prediction with trained adapters off, without gradient, (n, c, h, w) in fp32.

        It is the reference for held predictions and for the guided target. An assistant stays
        active, since the run trains on top of the base model with the assistant.

        Args:
            conditions: conditions of the n rows.
            noisy: noisy latents, (n, c, h, w).
            levels: noise levels of the latents, (n,).
        """
        if self._adapted is None:
            # Collected once, since walking over all modules takes time.
            self._adapted = []
            for model in (self.denoiser, *self.text_encoders):
                self._adapted += [layer for _, layer in adapters.layers(model)]
        with torch.no_grad(), adapters.off(self._adapted):
            return self._predict(conditions, noisy, levels).float()

    def squared_change(
        self, conditions: Conditions, noisy: Tensor, levels: Tensor, base_prediction: Tensor
    ) -> Tensor:
        """Return the mean squared change that the adapters make to each prediction, (n,), float32.

        The same adapters are active as in the rest of the loss. This includes an auxiliary, which
        must perturb the complete loss. Deactivating it in a context would also fail with gradient
        checkpointing, which recomputes layers after the context has ended.

        Args:
            conditions, noisy, levels: as in `base_prediction`.
            base_prediction: the base model's prediction for these inputs, (n, c, h, w).
        """
        prediction = self._predict(conditions, noisy, levels).float()
        return (prediction - base_prediction).square().flatten(1).mean(dim=1)

    def _predict(self, conditions: Conditions, noisy: Tensor, levels: Tensor) -> Tensor:
        """Return the denoiser's prediction, (n, c, h, w).

        Args:
            conditions: embeddings, or token ids if the text encoders are trained.
        """
        if "ids" in conditions:
            encoded = self._encode(conditions["ids"], conditions["has_text"])
            conditions = {**encoded, "time_ids": conditions["time_ids"]}
        dtype = precision(self.denoiser)
        conditions = move(conditions, noisy.device, dtype)
        return self.family.predict(self.denoiser, noisy.to(dtype), levels, conditions)

    def _encode(self, ids: Sequence[Tensor], has_text: Tensor) -> Conditions:
        """Embed token ids with the trained encoders; rows without text get zeros."""
        conditions = {}
        for name, values in encode(list(self.text_encoders), ids).items():
            rows = has_text.view(-1, *[1] * (values.ndim - 1))  # (n, 1, ...)
            conditions[name] = values.where(rows, 0.0)
        return conditions

    def sample_losses(self, inputs: dict[str, Any]) -> Tensor:
        """Return each row's loss against its plain target, (n,), in float32."""
        noisy, levels = self.noise_schedule.add_noise(inputs)  # (n, c, h, w), (n,)
        prediction = self._predict(caption_conditions(inputs), noisy, levels)
        return self.noise_schedule.loss(prediction, inputs)


def caption_conditions(inputs: dict[str, Any]) -> Conditions:
    """Return the conditions of the rows' own captions."""
    conditions = {}
    for name, values in inputs.items():
        if name not in NO_CONDITIONS:
            conditions[name] = values
    return conditions


def prompt_conditions(inputs: dict[str, Any], name: str) -> Conditions:
    """Return the conditions `PRIOR` or `UNCONDITIONAL`, with the sizes and crops of the rows."""
    return {**inputs[name], "time_ids": inputs["time_ids"]}


def grid_level_indices(total: int) -> list[int]:
    """Return the indices of the grid's noise levels in a schedule of ``total`` levels.

    The schedule is split into `NOISE_LEVELS` equal parts, and each index is a quarter into its
    part: 25, 125, ..., 925 of 1,000.
    """
    indices = []
    for part in range(NOISE_LEVELS):
        middle = total * (2 * part + 1) // (2 * NOISE_LEVELS)
        indices.append(middle - total // 40)
    return indices


class GridImage(NamedTuple):
    """An encoded image of the grid."""

    sample: TrainingSample
    latent: Tensor  # latent without noise, scaled as the denoiser takes it, (c, h, w)
    mask: Tensor | None  # mask in [0, 1], (1, h, w)


class GridLoss:
    """The mean loss over images and noise levels, with the same noise in every run.

    The noise does not depend on the run's seed.

    Args:
        task: a `DreamBooth`.
        stream: the training stream. Its images are measured with the same noise levels, so that two
            runs can be compared at equal training loss (``train_grid_loss``).
        heldout: the held-out images.

    Attributes:
        level_indices: indices of the noise levels.
        sets: the held-out images and the training images, by the name of their loss.
    """

    def __init__(self, task: Any, stream: Any, heldout: ImageSet) -> None:
        self.task = task
        self.level_indices = grid_level_indices(task.module.noise_schedule.num_timesteps)
        vae = task.pipeline.vae
        encoder = Encoder(
            vae,
            task.module.family.latent_space(vae),
            task.device,
            lambda _: True,  # the posteriors of all images are cached
            task.encoder.disk,
            task.encoder.cache,
        )
        self.sets = {
            HELDOUT_LOSS: self._load(encoder, heldout),
            TRAINING_GRID_LOSS: self._load(encoder, stream.images),
        }

    def _load(self, encoder: Encoder, images: ImageSet) -> list[GridImage]:
        """Encode the images of a set."""
        grid = []
        for sample in centered_samples(images, self.task.cfg):
            (posterior,) = encoder([sample])
            # The posterior's mean is used, since nothing in the grid is random.
            latent = encoder.space.encode(posterior.mean[None])[0]
            grid.append(GridImage(sample, latent, posterior.mask))
        return grid

    def __call__(self) -> dict[str, float]:
        """Return mean losses by name.

        - ``heldout_loss`` and ``train_grid_loss``: over the images of a set and all noise levels
        - ``heldout_loss_by_level/LEVEL``: over the held-out images at one noise level
        - ``heldout_loss_by_concept/NAME``: over the held-out images of one concept and all levels
        """
        with inference(self.task.module):
            tables = {name: self.table(images) for name, images in self.sets.items()}
        # Averaged first over the levels, then over the images, like the means by concept.
        losses = {name: float(table.mean(0).mean()) for name, table in tables.items()}
        heldout = tables[HELDOUT_LOSS]  # (levels, images)
        concepts = [image.sample.cfg.concept for image in self.sets[HELDOUT_LOSS]]
        for concept in filter(None, dict.fromkeys(concepts)):  # "" in a run without concepts
            is_of_concept = torch.tensor([name == concept for name in concepts])  # (images,)
            losses[f"{BY_CONCEPT}{concept}"] = float(heldout[:, is_of_concept].mean(0).mean())
        logged_levels = self.task.module.noise_schedule.logged_level(
            torch.tensor(self.level_indices)
        )
        level_losses = heldout.mean(1).tolist()
        for level, loss in zip(logged_levels.round().int().tolist(), level_losses, strict=True):
            losses[f"{BY_LEVEL}{level}"] = loss
        return losses

    def table(self, images: Sequence[GridImage]) -> Tensor:
        """Return the loss of each image at each noise level, (levels, images)."""
        tables = []
        for batch in self.batches(images):
            # (levels, images of the batch)
            tables.append(torch.stack([self.losses(batch, index) for index in self.level_indices]))
        return torch.cat(tables, dim=1)

    def batches(self, images: Sequence[GridImage]) -> Iterator[Sequence[GridImage]]:
        """Yield consecutive images of one shape: about `PIXELS_AT_ONCE` pixels, or one image."""
        size = max(1, PIXELS_AT_ONCE // self.task.cfg.resolution**2)
        for _, group in itertools.groupby(images, key=lambda image: image.latent.shape):
            same_shape = list(group)
            for start in range(0, len(same_shape), size):
                yield same_shape[start : start + size]

    def losses(self, images: Sequence[GridImage], level_index: int) -> Tensor:
        """Return the loss of each image at one noise level, (images,), on the CPU."""
        noise = []
        for image in images:
            # The key is the image's name and the level, so the noise is the same in every run and
            # set.
            random = generator("grid", image.sample.name, level_index)
            noise.append(torch.randn(image.latent.shape, generator=random))
        inputs = self.task.inputs(
            torch.stack([image.latent for image in images]),  # (n, c, h, w)
            torch.stack(noise),
            level_index=torch.full((len(images),), level_index),
            is_instance=torch.ones(len(images), dtype=torch.bool),
            samples=[image.sample for image in images],
            masks=[image.mask for image in images],
        )
        return self.task.module.sample_losses(send_to_device(inputs, self.task.device)).cpu()
