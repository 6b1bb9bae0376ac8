"""Noise, timesteps and the loss of a denoising model: what SDXL is trained on.

Noise prediction and velocity follow Ho et al. 2020 and Salimans & Ho 2022; min-SNR weights are
Section 3.4 of https://arxiv.org/abs/2303.09556; the EDM formulation is Section 5 of
https://arxiv.org/abs/2206.00364 as diffusers' DreamBooth scripts use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from .. import adapters
from ..core.errors import UserError
from ..train.task import precision
from .families.base import Conditions, Family, move
from .families.sdxl import encode
from .flow import FlowMatching, weighted_mean

PRIOR, UNCONDITIONAL = "prior", "unconditional"
"""Inputs that are conditions of further predictions: for the class's prompt, and for what guidance
leads away from.
"""
OTHER_INPUTS = frozenset(
    ("latents", "noise", "index", "instance", "mask_weights", PRIOR, UNCONDITIONAL)
)
"""Inputs that are not conditions of the images' own captions."""


@dataclass(frozen=True)
class Denoising:
    """A noise schedule with the loss that belongs to it, as `FlowMatching` has them."""

    scheduler: Any  # DDPM for the standard formulation, Euler or EDM-Euler for the EDM one
    kind: str = "standard"  # or "edm", on a variance-preserving model, or "edm_native"
    snr_gamma: float | None = None  # cap of the signal-to-noise weights; None for no weights
    snr_weighting: str = "published"  # or "diffusers", which differ for velocity

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        edm: bool = False,
        snr_gamma: float | None = None,
        snr_weighting: str = "published",
    ) -> Denoising:
        """Build from a pipeline's scheduler configuration; its class decides on native EDM.

        Raises:
            UserError: min-SNR weights together with the EDM formulation, or an unknown target.
        """
        class_name = str(config.get("_class_name", ""))
        is_native = "EDM" in class_name
        # EDM weights the loss itself, by sigma.
        if (edm or is_native) and snr_gamma is not None:
            raise UserError(
                f"--snr_gamma {snr_gamma} cannot be combined with EDM-style training: drop one."
            )
        if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise ValueError(f"it predicts '{config['prediction_type']}', not noise or velocity")
        if is_native:
            return cls(EDMEulerScheduler.from_config(config), "edm_native")
        standard: Any = DDPMScheduler.from_config(config)
        levels = standard.alphas_cumprod
        has_levels = "FlowMatch" not in class_name and "beta_start" in config and len(levels) > 0
        if not has_levels or not bool(((levels >= 0) & (levels < 1)).all()):
            raise ValueError(f"its scheduler, a {class_name}, has no noise levels from 0 to 1")
        if edm:
            return cls(EulerDiscreteScheduler.from_config(config), "edm")
        return cls(standard, "standard", snr_gamma, snr_weighting)

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler.config["num_train_timesteps"])

    def draw(self, random: torch.Generator) -> Tensor:
        return torch.randint(self.num_timesteps, (), generator=random)

    def level(self, index: Tensor) -> Tensor:
        return index

    def add_noise(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Noisy latents as the model takes them, (n, c, h, w), and their timesteps, (n,)."""
        index = inputs["index"]
        if self.kind == "standard":
            return self.scheduler.add_noise(inputs["latents"], inputs["noise"], index), index
        noisy, sigma = self._edm_noisy(inputs)
        timesteps = self.scheduler.timesteps.to(noisy.device)[index]
        if self.kind == "edm_native":
            return self.scheduler.precondition_inputs(noisy, sigma), timesteps
        # A variance-preserving model takes the noisy image scaled to unit variance.
        return noisy / (sigma**2 + 1).sqrt(), timesteps

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean square of each sample's error, (n,), of a prediction for what `add_noise` gives."""
        latents, noise, index = inputs["latents"], inputs["noise"], inputs["index"]
        prediction, mask_weights = prediction.float(), inputs.get("mask_weights")
        if self.kind != "standard":
            return weighted_mean(self._edm_squares(prediction, inputs), mask_weights)
        velocity = self.scheduler.config["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, index) if velocity else noise
        loss = weighted_mean((prediction - target.float()) ** 2, mask_weights)
        if self.snr_gamma is None:
            return loss
        is_floored = self.snr_weighting == "diffusers"
        weights = min_snr_weights(self._ratio(index), self.snr_gamma, velocity, is_floored)
        # Class images have no weights, as in diffusers' scripts.
        return torch.where(inputs["instance"], loss * weights, loss)

    def snr(self, index: Tensor) -> Tensor | None:
        if self.kind == "edm_native" or self.scheduler.config["prediction_type"] != "epsilon":
            return None
        return self._ratio(index) if self.kind == "standard" else self.scheduler.sigmas[index] ** -2

    def _ratio(self, index: Tensor) -> Tensor:
        """alpha / (1 - alpha), with the product of the alphas up to each timestep."""
        alphas = self.scheduler.alphas_cumprod.to(index.device)[index].float()
        return alphas / (1 - alphas)

    def _edm_noisy(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x + sigma e, (n, c, h, w), and sigma, (n, 1, 1, 1), both in float32."""
        latents = inputs["latents"]
        sigma = self.scheduler.sigmas.to(latents.device)[inputs["index"]].view(-1, 1, 1, 1).float()
        return latents.float() + sigma * inputs["noise"].float(), sigma

    def _edm_squares(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Weighted squares of the denoised image's error, (n, c, h, w)."""
        noisy, sigma = self._edm_noisy(inputs)
        clean = inputs["latents"].float()
        if self.kind == "edm_native":
            return (self.scheduler.precondition_outputs(noisy, prediction, sigma) - clean) ** 2
        if self.scheduler.config["prediction_type"] == "epsilon":
            denoised = noisy - sigma * prediction
        else:
            denoised = noisy / (sigma**2 + 1) - prediction * sigma / (sigma**2 + 1).sqrt()
        return sigma**-2 * (denoised - clean) ** 2


NoiseSchedule = Denoising | FlowMatching
"""Noise levels, and the loss that belongs to them."""


def min_snr_weights(snr: Tensor, gamma: float, velocity: bool, floored: bool = False) -> Tensor:
    """Min-SNR-gamma weights, (n,), for noise (or velocity) prediction at ratios ``snr``, (n,).

    min(snr, gamma) / snr, and min(snr, gamma) / (snr + 1) for velocity: either way, min(snr, gamma)
    times the error of the clean image (Section 3.4 of https://arxiv.org/abs/2303.09556). With
    ``floored`` velocity gets min(snr, gamma) / snr + 1, as in diffusers' DreamBooth scripts.
    """
    if velocity and not floored:
        return snr.clamp(max=gamma) / (snr + 1)
    weights = (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, also at a ratio of 0
    return weights + 1 if velocity else weights


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
