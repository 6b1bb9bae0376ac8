"""Bi-LoRA (Algorithm 1): the primary descends, the auxiliary ascends within a ball."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY
from ..errors import UserError
from . import ascent, ball, rounding
from .base import Counting, MethodOptions, Target, register, trained
from .hooks import unwrapped
from .options import rising


@register("bilora")
class BiLoRA(Counting):
    """min over B1, A1, max over ||B2 A2||_F <= rho of L(W0 + B1 A1 + B2 A2)  (Eqs. 7 and 8).

    The total norm runs over the layers of all targets. The auxiliary's group of the optimizer has
    `maximize=True` and no weight decay; the projection follows every optimizer step that is taken
    (not one that a gradient scaler skips). Gradient clipping sees the primary only: the ball bounds
    the auxiliary. What `MethodOptions` can change of this are ablations; their defaults are the
    paper's.
    """

    title = "Bi-LoRA"
    summary = (
        "Trained with Bi-LoRA: the primary adapter minimizes the loss while an auxiliary one, kept "
        "within a ball of radius rho, maximizes it. The file holds the primary adapter alone, so "
        "it is used like any LoRA file."
    )

    adapters = (PRIMARY, AUXILIARY)
    reads: ClassVar[frozenset[str]] = frozenset(
        {
            "rho",
            "rho_norm",
            "rho_schedule",
            "ball",
            "auxiliary_rank",
            "auxiliary_alpha",
            "auxiliary_learning_rate",
            "auxiliary_direction",
            "auxiliary_update",
            "rescale_moments",
        }
    )
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"auxiliary_learning_rate": 0.0})

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._layers: list[tuple[str, adapters.LoraLayer]] = []
        self._optimizer: Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self._last: ball.Projection | None = None
        self._halves: list[int] = []  # of a power iteration: whose turn it is on each layer
        self._probe = rounding.Probe()

    @property
    def depends_on_length(self) -> bool:
        return self.options.rho_schedule != "constant"

    def inject_others(self) -> None:
        # W = W0 + B1 A1 + B2 A2 (Eq. 7). B2 starts at zero; whatever the primary's init, A2 is
        # kaiming-uniform.
        for target in self.targets:
            auxiliary = replace(
                target.spec,
                rank=self.options.auxiliary_rank or target.spec.rank,
                alpha=self.options.auxiliary_alpha or target.spec.alpha,
                dropout=0.0,  # a perturbation of the weights is the same for every input
                init="default",
                use_dora=False,
            )
            adapters.inject(target.model, auxiliary, AUXILIARY)
        self._layers = self.layers(AUXILIARY)
        if self._power:
            for name, A, B, _ in self._factors():
                if A.shape[0] > min(A.shape[1], B.shape[0]):
                    raise UserError(
                        f"{name} is {B.shape[0]} x {A.shape[1]}, too small for power iteration at "
                        f"rank {A.shape[0]}; lower auxiliary_rank or take it out of the targets."
                    )
            ascent.orthonormalize_rows_(self._factors())
            self._halves = [0] * len(self._layers)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        # Eq. 9: descent on B1, A1 with eta_1, ascent on B2, A2 with eta_2, both from one gradient.
        groups = super().param_groups(targets)
        for target in targets:
            groups.append(
                {
                    "params": adapters.parameters(target.model, AUXILIARY),
                    "lr": self._auxiliary_lr(target, targets[0]),
                    "weight_decay": 0.0,
                    "maximize": self._climbs,
                    "name": f"{target.name}.{AUXILIARY}",
                }
            )
        return groups

    def _auxiliary_lr(self, target: Target, first: Target) -> float:
        rate = self.options.auxiliary_learning_rate
        if rate is None or target.lr == first.lr:
            return target.lr if rate is None else rate
        if first.lr == 0:
            raise UserError(
                f"The learning rate of {first.name} is 0, so auxiliary_learning_rate {rate} has "
                f"no ratio to keep for {target.name}; leave auxiliary_learning_rate out."
            )
        return rate * target.lr / first.lr

    def bind(self, optimizer: Optimizer) -> None:
        """Project after every step of `optimizer`, and see to it that it ascends on the auxiliary.

        An optimizer that knows no `maximize` (Prodigy, 8-bit AdamW) is given the auxiliary's
        negated gradients, which is the same for a group without weight decay.

        Raises:
            UserError: bound to it already; its groups are not those of `param_groups`; it can't be
                hooked.
        """
        optimizer = unwrapped(optimizer)
        if optimizer is self._optimizer:
            raise UserError("bind got the same optimizer twice; call it once, after making it.")
        self._check_groups(optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._power:
            self._hooks.append(optimizer.register_step_pre_hook(self._power_step))
        elif self._climbs and "maximize" not in optimizer.defaults:
            self._hooks.append(optimizer.register_step_pre_hook(self._refuse_closure))
            self._hooks.append(optimizer.register_step_pre_hook(self._negate))
            self._hooks.append(optimizer.register_step_post_hook(self._negate))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        self._optimizer = optimizer

    def project(self) -> ball.Projection:
        """Clip the auxiliary to the ball, over the layers of all targets (Eq. 10)."""
        rho, scaled = self._radius(), self._scaled
        factors = self._factors()
        if self.options.ball == "none":
            norm = ball.frobenius_norm(factors, scaled=scaled)
            return ball.Projection(norm, norm, torch.ones_like(norm))
        if self.options.ball == "global":
            last = ball.project_(factors, rho, scaled, onto=self._power)
            self._rescale(self._layers, last.factor)
            return last
        share = rho / math.sqrt(len(factors))
        each = []
        for layer, own in zip(self._layers, factors, strict=True):
            each.append(ball.project_([own], share, scaled, onto=self._power))
            self._rescale([layer], each[-1].factor)
        before, after, factor = (torch.stack(column) for column in zip(*each, strict=True))
        return ball.Projection(before.norm(), after.norm(), factor.amin())

    def auxiliary_norm(self) -> float:
        """The auxiliary's total Frobenius norm now, in the units of `rho_norm`."""
        return float(ball.frobenius_norm(self._factors(), scaled=self._scaled))

    def metrics(self) -> dict[str, float]:
        """The auxiliary's norm before and after the last projection; in bf16 or fp16, now and then,
        what rounding leaves of its effect (`rounding`).
        """
        if self._last is None:
            return {}
        return {
            "auxiliary_norm_before": float(self._last.before),
            "auxiliary_norm": float(self._last.after),
            **self._probe.read(self.rho),
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "halves": list(self._halves)} if self._power else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._halves = list(state.get("halves", ()))
        self._probe.arm(self._layers, self.taken)

    @property
    def _scaled(self) -> bool:
        return self.options.rho_norm == "scaled"

    def _factors(self) -> list[adapters.Factors]:
        return adapters.factors_of(self._layers, AUXILIARY)

    @property
    def _climbs(self) -> bool:
        return self.options.auxiliary_direction == "ascent"

    @property
    def _power(self) -> bool:
        return self.options.auxiliary_update == "power"

    def _radius(self) -> float:
        """rho of the step that is being taken."""
        if not self.depends_on_length:
            return self.rho
        progress = self.options.progress(max(1, self.taken))
        return self.rho * rising(self.options.rho_schedule, progress)

    def _after_step(self, *_: Any) -> None:
        self.taken += 1
        self._last = self.project()
        self._probe.arm(self._layers, self.taken)

    def _power_step(self, *_: Any) -> None:
        gradients = adapters.gradients_of(self._layers, AUXILIARY)
        sign = 1.0 if self._climbs else -1.0
        self._halves = ascent.power_step_(self._factors(), gradients, self._halves, sign)
        for parameter in self._parameters(self._layers):
            parameter.grad = None  # the optimizer passes over what has no gradient, and keeps none

    def _rescale(self, found: Sequence[tuple[str, adapters.LoraLayer]], factor: Tensor) -> None:
        if self.options.rescale_moments and self._optimizer is not None:
            ascent.rescale_moments_(self._optimizer, self._parameters(found), factor)

    @staticmethod
    def _parameters(found: Sequence[tuple[str, adapters.LoraLayer]]) -> list[nn.Parameter]:
        return [
            cast(nn.Parameter, holder[AUXILIARY].weight)
            for _, layer in found
            for holder in (layer.lora_A, layer.lora_B)
        ]

    def _negate(self, *_: Any) -> None:
        own = self._parameters(self._layers)
        if gradients := [p.grad for p in own if p.grad is not None]:
            torch._foreach_neg_(gradients)

    @staticmethod
    def _refuse_closure(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UserError(
                f"{type(optimizer).__name__} knows no maximize and was given a closure, in which "
                "the auxiliary's gradients can't be turned; call step() without one."
            )

    def _check_groups(self, optimizer: Optimizer) -> None:
        models = [target.model for target in self.targets]
        auxiliary = {id(p) for model in models for p in adapters.parameters(model, AUXILIARY)}
        primary = {id(p) for model in models for p in trained(model)}
        fix = "make the optimizer from param_groups() as it is."
        missing = auxiliary | primary
        for group in optimizer.param_groups:
            held = {id(p) for p in group["params"]}
            missing -= held
            ascends = bool(group.get("maximize", False))
            if held & auxiliary and (
                held - auxiliary or ascends != self._climbs or group.get("weight_decay", 0) != 0
            ):
                raise UserError(
                    f"The auxiliary's group has maximize={ascends}, "
                    f"weight_decay={group.get('weight_decay', 0)} "
                    f"and {len(held - auxiliary)} foreign parameters; {fix}"
                )
            if held & primary and ascends:
                raise UserError(
                    f"A group with maximize=True holds parameters of the primary; {fix}"
                )
        if missing:
            raise UserError(f"The optimizer lacks {len(missing)} parameters of the adapters; {fix}")
