"""LoRA-SAM (Eqs. 3-5): the gradient is taken at the nearby A and B with the highest loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from . import perturb
from .base import Method, StepOptimizer
from .registry import register


@register("lora-sam")
class LoRASAM(Method):
    """min over B, A of max over ||(e_B, e_A)|| <= rho of L(W0 + (B + e_B)(A + e_A)).

    A step takes two passes. e = rho g / ||g||, with one norm over the factors of all layers and
    targets and over the modules that are trained in full. g is the gradient of the whole batch, and
    both passes use the same micro-batches. Only the second gradient is clipped. The logged loss is
    that of the first pass.

    Source: Foret et al. 2021 (https://arxiv.org/abs/2010.01412), applied to LoRA's parameters as in
    Section 3.2 of the Bi-LoRA paper, which uses rho = 0.01 (GLUE, language models) and 0.05
    (SuperGLUE).
    """

    title = "LoRA-SAM"
    summary = (
        "Trained with SAM on the adapter: each gradient is taken where the loss is highest within "
        "a distance of rho from the adapter's factors."
    )

    reads: ClassVar[frozenset[str]] = frozenset({"rho"})
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"rho": 1e-30})
    default_text_rho: ClassVar[float | None] = 0.01
    passes: ClassVar[int] = 2

    # Losses of the last step before and after the ascent by e; None before the first step.
    losses: tuple[Tensor, Tensor] | None = None

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        loss = forward_backward()
        # Eqs. 3 and 4: e = rho g / ||g||; Eq. 5: the gradient at A + e_A, B + e_B.
        with perturb.restored(self.weights):
            perturb.climb_(self.weights, self.rho)
            if self.on_perturbed is not None:
                self.on_perturbed()
            optimizer.zero_grad()  # removes e, which `climb_` left in `.grad`
            perturbed = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        self.losses = (loss, perturbed)
        return loss

    def metrics(self) -> dict[str, float]:
        """Return how much e raised the loss in the last step: SAM's sharpness on the batch."""
        if self.losses is None:
            return {}
        before, after = self.losses
        return {"sharpness": float(after - before)}
