"""Noise levels and losses of diffusion models and of flow matching.

``level_index`` is the index of a noise level. The denoiser gets the level's timestep or sigma. The
log shows a timestep or 1000 sigma (`logged_level`).

`Denoising` is for SDXL. Noise prediction follows Ho et al. 2020, and velocity prediction follows
Salimans & Ho 2022. The min-SNR weights are those of Section 3.4 of
https://arxiv.org/abs/2303.09556. The EDM formulation is that of Section 5 of
https://arxiv.org/abs/2206.00364, as implemented in diffusers' DreamBooth scripts.

`FlowMatching` is for SD3, FLUX and later image models. The path from an image x0 to noise e is
straight, x_s = (1 - s) x0 + s e, and the model predicts the velocity e - x0 (Liu et al. 2022,
https://arxiv.org/abs/2209.03003; Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

from ..core.errors import UserError
from ..core.values import MODEL_SHIFT, NO_SHIFT
from .config import DreamBoothConfig
from .families.base import Family
from .sampled_levels import ALL_LEVELS, SampledLevels


@dataclass(frozen=True)
class Denoising(SampledLevels):
    """The noise schedule of a diffusion model. It has the same methods as `FlowMatching`."""

    scheduler: Any  # DDPM for "standard", Euler for "edm", EDM Euler for "edm_native"
    kind: str = "standard"  # or "edm" (EDM on a variance-preserving model), or "edm_native"
    snr_gamma: float | None = None  # gamma of the min-SNR weights; None: no weights
    snr_weighting: str = "published"  # or "diffusers"; they differ for velocity prediction
    level_range: tuple[float, float] = ALL_LEVELS

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        edm: bool = False,
        snr_gamma: float | None = None,
        snr_weighting: str = "published",
        level_range: tuple[float, float] = ALL_LEVELS,
    ) -> Denoising:
        """Build the schedule from a scheduler's configuration.

        A scheduler class with "EDM" in its name selects the kind "edm_native".

        Raises:
            UserError: min-SNR weights are used with the EDM formulation, or a range of levels is
                used on a model with native EDM.
            ValueError: the kind of prediction or of noise levels is not supported.
        """
        class_name = str(config.get("_class_name", ""))
        is_native = "EDM" in class_name
        # EDM has its own loss weights.
        if (edm or is_native) and snr_gamma is not None:
            raise UserError(
                f"--snr_gamma {snr_gamma} cannot be combined with EDM-style training: drop it."
            )
        if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise ValueError(f"it predicts '{config['prediction_type']}', not noise or velocity")
        if is_native:
            if level_range != ALL_LEVELS:
                low, high = level_range
                raise UserError(
                    f"--timestep_range {low:g} {high:g} can't be used on a model with an"
                    f" {class_name}, whose noise levels are not fractions of a full noise: drop it."
                )
            return cls(EDMEulerScheduler.from_config(config), "edm_native")
        standard: Any = DDPMScheduler.from_config(config)
        # alpha_bar, the product of the alphas up to each timestep, (T,)
        signal = standard.alphas_cumprod
        has_levels = "FlowMatch" not in class_name and "beta_start" in config and len(signal) > 0
        if not has_levels or not bool(((signal >= 0) & (signal < 1)).all()):
            raise ValueError(f"its scheduler, a {class_name}, has no noise levels from 0 to 1")
        if edm:
            euler = EulerDiscreteScheduler.from_config(config)
            return cls(euler, "edm", level_range=level_range)
        return cls(standard, "standard", snr_gamma, snr_weighting, level_range)

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels."""
        return int(self.scheduler.config["num_train_timesteps"])

    @property
    def predicts_velocity(self) -> bool:
        """True if the model predicts a velocity, False if it predicts noise."""
        return self.scheduler.config["prediction_type"] == "v_prediction"

    def sample_all(self, count: int, random: torch.Generator) -> Tensor:
        """Sample indices of noise levels uniformly, (count,)."""
        return torch.randint(self.num_timesteps, (count,), generator=random)

    def share(self, level_index: Tensor) -> Tensor:
        return self.logged_level(level_index).double() / self.num_timesteps

    def logged_level(self, level_index: Tensor) -> Tensor:
        """Return the values that the log shows for noise level indices: timesteps.

        A model with native EDM has no such timesteps; its levels are numbered in the same order,
        from little noise to much.
        """
        if self.kind == "standard":
            return level_index
        return self.num_timesteps - 1 - level_index  # index 0 is the noisiest level

    def add_noise(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return noisy latents for the model, (n, c, h, w), and their timesteps, (n,).

        Args:
            inputs: as in `FlowMatching.loss`.
        """
        level_index = inputs["level_index"]
        if self.kind == "standard":
            noisy = self.scheduler.add_noise(inputs["latents"], inputs["noise"], level_index)
            return noisy, level_index
        noisy, sigma = self._edm_noisy(inputs)
        timesteps = self.scheduler.timesteps.to(noisy.device)[level_index]
        if self.kind == "edm_native":
            return self.scheduler.precondition_inputs(noisy, sigma), timesteps
        # A variance-preserving model expects noisy latents of unit variance.
        return noisy / (sigma**2 + 1).sqrt(), timesteps

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted mean squared error of each sample, (n,) in float32.

        Args:
            prediction: the model's output for the result of `add_noise`, (n, c, h, w).
            inputs: as in `FlowMatching.loss`.
        """
        latents, noise, level_index = inputs["latents"], inputs["noise"], inputs["level_index"]
        prediction = prediction.float()
        mask_weights = inputs.get("mask_weights")
        if self.kind != "standard":
            return weighted_mean(self._edm_squares(prediction, inputs), mask_weights)
        target = noise
        if self.predicts_velocity:
            target = self.scheduler.get_velocity(latents, noise, level_index)
        loss = weighted_mean((prediction - target.float()) ** 2, mask_weights)
        if self.snr_gamma is None:
            return loss
        is_floored = self.snr_weighting == "diffusers"
        ratios = self._standard_snr(level_index)
        weights = min_snr_weights(ratios, self.snr_gamma, self.predicts_velocity, is_floored)
        # Class images are not weighted, as in diffusers' scripts.
        return torch.where(inputs["is_instance"], loss * weights, loss)

    def _standard_snr(self, level_index: Tensor) -> Tensor:
        """Return the signal-to-noise ratios, alpha_bar / (1 - alpha_bar), (n,)."""
        signal = self.scheduler.alphas_cumprod.to(level_index.device)[level_index].float()
        return signal / (1 - signal)

    def _edm_noisy(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return x0 + sigma e, (n, c, h, w), and sigma, (n, 1, 1, 1), both in float32."""
        latents = inputs["latents"]
        sigma = self.scheduler.sigmas.to(latents.device)[inputs["level_index"]]  # (n,)
        sigma = sigma.view(-1, 1, 1, 1).float()
        return latents.float() + sigma * inputs["noise"].float(), sigma

    def _edm_squares(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted squared errors of the denoised latents, (n, c, h, w)."""
        noisy, sigma = self._edm_noisy(inputs)
        clean = inputs["latents"].float()
        if self.kind == "edm_native":
            # Not weighted, as in diffusers' scripts, where weights caused numerical problems.
            return (self.scheduler.precondition_outputs(noisy, prediction, sigma) - clean) ** 2
        # Compute clean latents from the prediction, v or e, of a variance-preserving model.
        if self.predicts_velocity:
            denoised = noisy / (sigma**2 + 1) - prediction * sigma / (sigma**2 + 1).sqrt()
        else:
            denoised = noisy - sigma * prediction
        return sigma**-2 * (denoised - clean) ** 2


def min_snr_weights(snr: Tensor, gamma: float, velocity: bool, floored: bool = False) -> Tensor:
    """Return the min-SNR-gamma weights, (n,), at signal-to-noise ratios ``snr``, (n,).

    The weight is min(snr, gamma) / snr for noise prediction, and min(snr, gamma) / (snr + 1) for
    velocity prediction. In both cases, the clean image's error gets the weight min(snr, gamma)
    (Section 3.4 of https://arxiv.org/abs/2303.09556). With ``floored``, the weight for velocity
    prediction is min(snr, gamma) / snr + 1, as in diffusers' DreamBooth scripts.
    """
    if velocity and not floored:
        return snr.clamp(max=gamma) / (snr + 1)
    weights = (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr; 1 at snr = 0
    if velocity:
        return weights + 1
    return weights


@dataclass(frozen=True)
class FlowMatching(SampledLevels):
    """The noise schedule of a flow-matching model. A scheme samples or weights its levels.

    Class images have the same weights as instance images.

    Args:
        sigmas: noise levels in decreasing order, starting at 1, (T,).
        scheme: how levels are sampled and weighted (Section 3.1 of Esser et al. 2024): "none"
            samples uniformly, "logit_normal" and "mode" sample middle levels more often,
            "sigma_sqrt" and "cosmap" weight the loss.
        logit_mean, logit_std: parameters of "logit_normal".
        mode_scale: parameter of "mode".
        preconditioned: also weight by s^2, which gives the error of the clean image, x_s - s v
            (Section 5 of Karras et al. 2022, https://arxiv.org/abs/2206.00364).
        level_range: lowest and highest level to sample, as fractions of the full noise.
    """

    sigmas: Tensor
    scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    preconditioned: bool = False
    level_range: tuple[float, float] = ALL_LEVELS

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        mu: float | None = None,
        *,
        shift: float | None = None,
        **settings: Any,
    ) -> Self:
        """Build the schedule from all noise levels of a pipeline's scheduler.

        Args:
            config: configuration of the scheduler, which shifts the levels by its ``shift`` or by
                ``mu``.
            mu: logarithm of the shift, for a scheduler whose shift depends on the resolution.
            shift: a shift s that replaces the scheduler's: evenly spaced levels t become
                s t / (1 + (s - 1) t). 1 leaves them evenly spaced.
            settings: other arguments of the class.

        Raises:
            ValueError: the scheduler is not one of a flow-matching model.
        """
        kind = str(config.get("_class_name", "FlowMatch"))
        if "FlowMatch" not in kind:
            raise ValueError(f"its scheduler, a {kind}, has no straight paths to noise")
        changes: dict[str, Any] = {}
        if shift is not None:
            mu = None
            # Qwen-Image's `shift_terminal` is disabled too, since it would stretch the levels.
            changes = {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": None}
        # Passed as arguments, since diffusers ignores configuration values that were its defaults.
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config, **changes)
        steps = int(scheduler.config["num_train_timesteps"])
        even_levels = [(steps - i) / steps for i in range(steps)]  # 1 down to 1 / steps
        scheduler.set_timesteps(sigmas=even_levels, mu=mu)
        return cls(scheduler.sigmas[:-1].float(), **settings)  # without the final 0

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels."""
        return len(self.sigmas)

    def sample_all(self, count: int, random: torch.Generator) -> Tensor:
        """Sample indices of noise levels by the scheme, (count,)."""
        places = compute_density_for_timestep_sampling(
            self.scheme, count, self.logit_mean, self.logit_std, self.mode_scale, generator=random
        )
        return (places * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def share(self, level_index: Tensor) -> Tensor:
        return self.sigmas[level_index]

    def logged_level(self, level_index: Tensor) -> Tensor:
        """Return the values that the log shows for noise level indices: 1000 sigma."""
        return 1000 * self.sigmas[level_index]

    def add_noise(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return noisy latents x_s = (1 - s) x0 + s e, (n, c, h, w), and s in [0, 1], (n,).

        Args:
            inputs: as in `loss`.
        """
        latents = inputs["latents"]
        sigma = self.sigmas.to(latents.device)[inputs["level_index"]]  # (n,)
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * latents + s * inputs["noise"], sigma

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weight w(s) times the velocity's mean squared error, (n,) in float32.

        Args:
            prediction: the model's output for the result of `add_noise`, (n, c, h, w).
            inputs: clean ``latents`` and standard normal ``noise``, (n, c, h, w); ``level_index``,
                the index of each sample's noise level, (n,); ``is_instance``, False for class
                images, (n,); and, with masks, ``mask_weights`` of the positions, (n, 1, h, w).
        """
        latents, noise = inputs["latents"], inputs["noise"]
        sigma = self.sigmas.to(latents.device)[inputs["level_index"]]  # (n,)
        # The velocity along the path from x0 to e is e - x0.
        squares = (prediction.float() - (noise - latents).float()) ** 2
        weights = compute_loss_weighting_for_sd3(self.scheme, sigma)
        if self.preconditioned:
            weights = weights * sigma**2
        return weights.float() * weighted_mean(squares, inputs.get("mask_weights"))


def weighted_mean(squares: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted mean of each sample's squared errors, (n,); 0 if all weights are 0.

    Args:
        squares: squared errors, (n, c, h, w).
        weights: weights of the positions, (n, 1, h, w), the same for all channels; None for a
            plain mean.
    """
    if weights is None:
        return squares.flatten(1).mean(dim=1)
    total = squares.shape[1] * weights.flatten(1).sum(dim=1)
    smallest = torch.finfo(total.dtype).tiny
    return (squares * weights).flatten(1).sum(dim=1) / total.clamp_min(smallest)


NoiseSchedule = Denoising | FlowMatching


def noise_schedule(cfg: DreamBoothConfig, family: Family, pipeline: Any) -> NoiseSchedule:
    """Build the noise schedule of a run from its options.

    Raises:
        UserError: ``--timestep_range`` contains too few levels, or an option does not fit the
            model.
        ValueError: the model's scheduler or its kind of prediction is not supported.
    """
    config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    low, high = cfg.timestep_range
    if family.flow:
        schedule = FlowMatching.from_config(
            config,
            **level_shift(cfg, family, pipeline),
            scheme=cfg.weighting_scheme or family.weighting,
            logit_mean=cfg.logit_mean,
            logit_std=cfg.logit_std,
            mode_scale=cfg.mode_scale,
            preconditioned=cfg.precondition_outputs,
            level_range=(low, high),
        )
    else:
        schedule = Denoising.from_config(
            config,
            edm=cfg.do_edm_style_training,
            snr_gamma=cfg.snr_gamma,
            snr_weighting=cfg.snr_weighting,
            level_range=(low, high),
        )
    schedule.require_samples()
    return schedule


def level_shift(cfg: DreamBoothConfig, family: Family, pipeline: Any) -> dict[str, float]:
    """Return the training shift of a flow model's noise levels, for `FlowMatching.from_config`.

    Returns:
        The argument ``shift``, or ``mu`` to keep the shift of the pipeline's scheduler.
    """
    tokens = family.tokens(cfg.resolution, cfg.resolution)
    shift = cfg.timestep_shift
    if shift == NO_SHIFT:
        return {"shift": 1.0}
    if not isinstance(shift, str):
        return {"shift": shift}
    model_shift = family.training_shift(tokens)
    if shift == MODEL_SHIFT and model_shift is not None:
        return {"shift": model_shift}
    return {"mu": family.mu(pipeline, tokens)}
