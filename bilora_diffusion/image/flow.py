"""Flow matching along straight paths: what SD3, FLUX and later image models are trained on.

x_s = (1 - s) x0 + s e with noise e; the model predicts the velocity e - x0 (Liu et al. 2022,
https://arxiv.org/abs/2209.03003; Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor


@dataclass(frozen=True)
class FlowMatching:
    """Noise levels of a model's own schedule, sampled and weighted by a scheme; class images have
    the same weights.

    Args:
        sigmas: noise levels from 1 downwards, (T,).
        scheme: how levels are sampled and weighted (Section 3.1 of Esser et al. 2024): "none"
            samples all alike, "logit_normal" and "mode" the middle more often, "sigma_sqrt" and
            "cosmap" weight the loss.
        logit_mean, logit_std: of "logit_normal".
        mode_scale: of "mode".
        preconditioned: weigh by s^2 as well: the error of x_s - s v, the clean image (Section 5 of
            Karras et al. 2022, https://arxiv.org/abs/2206.00364).
    """

    sigmas: Tensor
    scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    preconditioned: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any], mu: float | None, **drawing: Any) -> Self:
        """With the levels that a pipeline's scheduler goes through in as many steps as it has.

        Args:
            config: of the scheduler; its ``shift`` acts, or, where it shifts by resolution,
            mu: the logarithm of the shift; None leaves such levels unshifted.
            drawing: the other arguments.
        """
        if "FlowMatch" not in (kind := str(config.get("_class_name", "FlowMatch"))):
            raise ValueError(f"its scheduler, a {kind}, has no straight paths to noise")
        # Without mu the scheduler would refuse to shift by resolution.
        if mu is None and config.get("use_dynamic_shifting"):
            config = {**config, "use_dynamic_shifting": False, "shift": 1.0}
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        steps = int(scheduler.config["num_train_timesteps"])
        even = [(steps - i) / steps for i in range(steps)]  # 1 down to 1 / steps
        scheduler.set_timesteps(sigmas=even, mu=mu)
        return cls(scheduler.sigmas[:-1].float(), **drawing)  # without the 0 at the end

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels."""
        return len(self.sigmas)

    def draw(self, random: torch.Generator) -> Tensor:
        """The number of a noise level, 0-d."""
        share = compute_density_for_timestep_sampling(
            self.scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=random
        )
        return (share * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)[0]

    def level(self, index: Tensor) -> Tensor:
        """Noise levels as logs name them, by their numbers."""
        return 1000 * self.sigmas[index]

    def snr(self, index: Tensor) -> Tensor | None:
        """Signal-to-noise ratios by the levels' numbers, (n,), where a model predicts noise, of
        which it errs the less the less signal there is; else None, as here.
        """
        return None

    def add_noise(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x_s = (1 - s) x0 + s e as a model takes it, (n, c, h, w), and s in [0, 1], (n,).

        Args:
            inputs: as of `loss`.
        """
        latents = inputs["latents"]
        sigma = self.sigmas.to(latents.device)[inputs["index"]]  # (n,)
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * latents + s * inputs["noise"], sigma

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """w(s) times the mean square of the velocity's error, (n,) in float32.

        Args:
            prediction: of a model for what `add_noise` gives, (n, c, h, w).
            inputs: clean ``latents`` and standard normal ``noise``, (n, c, h, w); the ``index`` of
                each sample's noise level, (n,); True in ``instance``, (n,), for images that are not
                class images; and, with masks, ``mask_weights`` of the places, (n, 1, h, w).
        """
        latents, noise = inputs["latents"], inputs["noise"]
        sigma = self.sigmas.to(latents.device)[inputs["index"]]  # (n,)
        # The velocity along the path from x0 to e is e - x0.
        squares = (prediction.float() - (noise - latents).float()) ** 2
        weights = compute_loss_weighting_for_sd3(self.scheme, sigma)
        if self.preconditioned:
            weights = weights * sigma**2
        return weights.float() * weighted_mean(squares, inputs.get("mask_weights"))


def weighted_mean(squares: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over each sample of (n, c, h, w), weighted by (n, 1, h, w): (n,); 0 without a weight."""
    if weights is None:
        return squares.flatten(1).mean(dim=1)
    # The weights are the same for all channels.
    total = squares.shape[1] * weights.flatten(1).sum(dim=1)
    smallest = torch.finfo(total.dtype).tiny
    return (squares * weights).flatten(1).sum(dim=1) / total.clamp_min(smallest)
