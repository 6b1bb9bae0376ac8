"""Bi-LoRA (Algorithm 1): the primary descends, the auxiliary ascends within a ball."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ... import adapters
from ...adapters import AUXILIARY, PRIMARY
from ...core.choices import AUTO
from ...core.errors import UserError
from ..base import StepOptimizer, Target
from ..hooks import ascend, unwrapped
from ..registry import register
from . import ball
from . import per_sample as auxiliaries
from .auxiliary import WithAuxiliary, learning_rate
from .radius import AutoRadius


@register("bilora")
class BiLoRA(WithAuxiliary):
    """min over B1, A1, max over ||B2 A2||_F <= rho of L(W0 + B1 A1 + B2 A2)  (Eqs. 7 and 8).

    The total norm runs over the layers of all targets. The auxiliary's group of the optimizer has
    `maximize=True` and no weight decay; the projection follows every optimizer step that is taken
    (not one that a gradient scaler skips). Gradient clipping sees the primary only.
    """

    title = "Bi-LoRA"
    summary = (
        "Trained with Bi-LoRA: the primary adapter minimizes the loss while an auxiliary one, kept "
        "within a ball of radius rho, maximizes it. The file holds the primary adapter alone, so "
        "it is used like any LoRA file."
    )
    adapters = (PRIMARY, AUXILIARY)
    reads: ClassVar[frozenset[str]] = frozenset(
        (
            *("rho", "loss_rise", "rho_norm", "ball", "auxiliaries"),
            *("auxiliary_rank", "auxiliary_alpha", "auxiliary_learning_rate"),
            *("auxiliary_direction", "auxiliary_snr_gamma"),
        )
    )
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"auxiliary_learning_rate": 0.0})

    radius: AutoRadius | None = None
    _optimizer: Optimizer | None = None
    _hooks: Sequence[RemovableHandle] = ()
    _last: ball.Projection | None = None

    def inject_others(self) -> None:
        # Eq. 7. B2 starts at zero; whatever the primary's init, A2 is kaiming-uniform.
        for target in self.targets:
            spec = replace(
                target.spec,
                rank=self.options.auxiliary_rank or target.spec.rank,
                alpha=self.options.auxiliary_alpha or target.spec.alpha,
                dropout=0.0,  # a perturbation of the weights is the same for every input
                init="default",
                use_dora=False,
            )
            adapters.inject(target.model, spec, AUXILIARY)
        layers = [adapters.layers(target.model, AUXILIARY) for target in self.targets]
        self.auxiliary = auxiliaries.create(layers, self.options)
        if self.options.rho == AUTO:
            self.radius = AutoRadius(layers, self.options, self.auxiliary.count)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        # Eq. 9: descent on B1, A1 with eta_1, ascent on B2, A2 with eta_2, both from one gradient.
        self.auxiliary.follow()
        return super().param_groups(targets) + [
            {
                "params": self.auxiliary.parameters(number),
                "lr": learning_rate(self.options, target, targets[0]),
                "weight_decay": 0.0,
                "maximize": self._climbs,
                "name": f"{target.name}.{AUXILIARY}",
            }
            for number, target in enumerate(targets)
        ]

    def bind(self, optimizer: Optimizer) -> None:
        """Project after every step of `optimizer`, and see to it that it ascends on the auxiliary.

        Raises:
            UserError: bound to it already; its groups are not those of `param_groups`; it can't be
                hooked.
        """
        optimizer = unwrapped(optimizer)
        if optimizer is self._optimizer:
            raise UserError("bind got the same optimizer twice; call it once, after making it.")
        self.check_groups(optimizer)
        for hook in self._hooks:
            hook.remove()
        turns = self._climbs and "maximize" not in optimizer.defaults
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            *(ascend(optimizer, self.auxiliary.parameters) if turns else ()),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._optimizer = optimizer

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        def observed() -> Tensor:
            loss = forward_backward()
            self.observe(loss)
            return loss

        return super().step(observed, optimizer)

    def observe(self, loss: Tensor) -> None:
        """Take the loss of the coming step, 0-d, over all micro-batches and processes."""
        if self.radius is not None:
            self.radius.observe(loss)

    def metrics(self) -> dict[str, float]:
        """Norms before and after the last projection (of several the largest), and the radius."""
        if self._last is None:
            return {}
        return {
            "auxiliary_norm_before": float(self._last.before),
            "auxiliary_norm": float(self._last.after),
            **({} if self.radius is None else self.radius.metrics()),
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self.radius is None else self.radius.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.radius is not None:
            self.radius.load_state_dict(state)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.auxiliary.before_step(optimizer)
        if self.radius is not None:
            self.radius.before_step(self.auxiliary)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.taken += 1
        if moved := self.auxiliary.moving():  # else no row was a sample
            rho = self.rho if self.radius is None else self.radius.after_step(self.auxiliary)
            self._last = self.auxiliary.project_(moved, rho)
            if self.radius is not None:
                self.radius.projected(self._last.after)
        self.auxiliary.release(optimizer)
