"""Bi-LoRA (Algorithm 1): the primary descends, the auxiliary ascends within a ball."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ... import adapters
from ...adapters import AUXILIARY, PRIMARY
from ...core.errors import UserError
from ..base import CountingMethod, MethodOptions, Target, TrainedBytes, unwrap
from ..registry import register
from . import ball
from .auxiliary import (
    auxiliary_factors,
    auxiliary_spec,
    check_groups,
    turn_gradients,
)


@register("bilora")
class BiLoRA(CountingMethod):
    """min over B1, A1, max over ||B2 A2||_F <= rho of L(W0 + B1 A1 + B2 A2)  (Eqs. 7 and 8).

    ||B2 A2||_F is taken over the layers of all targets; with `rho_norm` "scaled", the default, it
    includes the scale: ||s2 B2 A2||_F. The auxiliary's gradients are not clipped, and they do not
    count in the norm that is clipped.

    Attributes:
        optimizer: torch optimizer that the method is bound to; None before `bind`.
        projection: last projection onto the ball; None before the first one.
    """

    title = "Bi-LoRA"
    summary = (
        "Trained with Bi-LoRA: the primary adapter minimizes the loss while an auxiliary adapter "
        "maximizes it within a ball of radius rho. The file contains only the primary adapter, so "
        "it works like any LoRA file."
    )
    adapters = (PRIMARY, AUXILIARY)
    reads: ClassVar[frozenset[str]] = frozenset(
        {"rho", "rho_norm", "auxiliary_rank", "auxiliary_alpha", "auxiliary_learning_rate"}
    )
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType(
        {"auxiliary_learning_rate": 0.0}
    )

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self.optimizer: Optimizer | None = None
        self.projection: ball.Projection | None = None
        self._hooks: list[RemovableHandle] = []

    def inject_adapters(self) -> None:
        # Eq. 7: W = W0 + s1 B1 A1 + s2 B2 A2
        super().inject_adapters()
        for target in self.targets:
            adapters.inject(target.model, auxiliary_spec(self.options, target.spec), AUXILIARY)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        # Eq. 9: descent on B1, A1 with eta_1, ascent on B2, A2 with eta_2, both from one gradient.
        groups = super().param_groups(targets)
        for target in targets:
            groups.append(
                {
                    "params": adapters.parameters(target.model, AUXILIARY),
                    "lr": auxiliary_rate(self.options, target.lr, targets[0].lr),
                    "weight_decay": 0.0,
                    "maximize": True,
                    "name": f"{target.name}.{AUXILIARY}",
                }
            )
        return groups

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Return A2 and B2 of all targets."""
        parameters: list[nn.Parameter] = []
        for target in self.targets:
            parameters += adapters.parameters(target.model, AUXILIARY)
        return parameters

    def bind(self, optimizer: Optimizer) -> None:
        """Make each step that `optimizer` takes ascend on the auxiliary and project it.

        Raises:
            UserError: the optimizer is already bound, its groups are not those of `param_groups`,
                or it can't have hooks.
        """
        optimizer = unwrap(optimizer)
        if optimizer is self.optimizer:
            raise UserError("bind got the same optimizer twice; call it once per optimizer.")
        check_groups(optimizer, self.result_parameters(), self.auxiliary_parameters())
        super().bind(optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        # Hooks run in the order of their registration, on unscaled and clipped gradients. They do
        # not run if a gradient scaler skips `optimizer.step()`; torch's fused optimizers skip
        # inside the kernel and would still run the hooks, so `train.optimizers` turns that off.
        if "maximize" not in optimizer.defaults:
            self._hooks += turn_gradients(optimizer, self.auxiliary_parameters())
        self._hooks.append(optimizer.register_step_post_hook(self._project))
        self.optimizer = optimizer

    def _project(self, *_: Any) -> None:
        self.steps_taken += 1
        # Eq. 10: (A2, B2) <- sqrt(rho / c) (A2, B2) where c = ||s2 B2 A2||_F exceeds rho. With
        # `rho_norm` "unscaled", s2 is 1.
        factors = auxiliary_factors(self.layers, self.options.rho_norm)
        self.projection = ball.project_(factors, self.rho)

    def auxiliary_norm(self) -> float:
        """Return the auxiliary's norm over all layers, in the units of `rho_norm`."""
        factors = auxiliary_factors(self.layers, self.options.rho_norm)
        return float(ball.frobenius_norm(factors))

    def metrics(self) -> dict[str, float]:
        """Return the norms before and after the last projection; {} before the first one."""
        if self.projection is None:
            return {}
        return {
            "auxiliary_norm_before": float(self.projection.before),  # c of Eq. 10
            "auxiliary_norm": float(self.projection.after),
        }

    def memory(self) -> TrainedBytes:
        trained = super().memory()
        auxiliary_bytes = trained.adapters[AUXILIARY]
        return TrainedBytes(
            trained.adapters,
            gradients=trained.gradients + auxiliary_bytes,
            optimized=trained.optimized + auxiliary_bytes,
            result=trained.result,
        )


def auxiliary_rate(options: MethodOptions, rate: float, first_rate: float) -> float:
    """Return the auxiliary's learning rate, eta_2 of Eq. 9, for one of several trained models.

    A given rate applies to the first model. The other models' rates keep the ratios of the
    primaries' rates: text encoders are trained more slowly than the denoiser.

    Args:
        options: the method's options, with ``auxiliary_learning_rate``.
        rate: learning rate of this model's primary.
        first_rate: learning rate of the first model's primary.

    Raises:
        UserError: an auxiliary rate is given, and the first model's rate is 0 but this model's is
            not, so there is no ratio.
    """
    given_rate = options.auxiliary_learning_rate
    if given_rate is None:
        return rate  # eta_2 = eta_1, as in the paper's experiments (Appendix G)
    if rate == first_rate:
        return given_rate
    if first_rate == 0:
        raise UserError(
            "The learning rate of the first model is 0, so auxiliary_learning_rate"
            f" {given_rate} defines no rate for the other models; leave it out."
        )
    return given_rate * rate / first_rate
