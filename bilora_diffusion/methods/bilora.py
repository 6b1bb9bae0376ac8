"""Bi-LoRA (Algorithm 1): the primary descends, the auxiliary ascends within a ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import adapters
from ..adapters import AUXILIARY, PRIMARY
from ..choices import AUTO
from ..errors import UserError
from . import ascent, ball, perturb, radius
from .auxiliaries import Auxiliaries, deal
from .base import Counting, MethodOptions, StepOptimizer, Target, trained
from .hooks import check_groups, refuse_closure, unwrapped
from .options import rising
from .registry import register


@register("bilora")
class BiLoRA(Counting):
    """min over B1, A1, max over ||B2 A2||_F <= rho of L(W0 + B1 A1 + B2 A2)  (Eqs. 7 and 8).

    The total norm runs over the layers of all targets. The auxiliary's group of the optimizer has
    `maximize=True` and no weight decay; the projection follows every optimizer step that is taken
    (not one that a gradient scaler skips). Gradient clipping sees the primary only: the ball bounds
    the auxiliary. With `MethodOptions.auxiliaries` each sample, or each of so many groups, has one
    of its own (`methods/auxiliaries.py`). What other options change of this are ablations.
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
            *("rho", "loss_rise", "rho_norm", "rho_schedule", "ball", "rescale_moments"),
            *("auxiliaries", "auxiliaries_on", "auxiliary_rank", "auxiliary_alpha"),
            *("auxiliary_learning_rate", "auxiliary_direction", "auxiliary_update"),
        )
    )
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"auxiliary_learning_rate": 0.0})

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._layers: list[tuple[str, adapters.LoraLayer]] = []
        self._optimizer: Optimizer | None = None
        self._shrinking: dict[str, int] = {}  # what of its state a projection multiplies too
        self._hooks: list[RemovableHandle] = []
        self._scales: list[float] = []  # what the norm of each layer's B2 A2 is multiplied with
        self._primary: list[float] = []  # and of its B1 A1
        self._many: Auxiliaries | None = None  # where there is more than one
        self._last: ball.Projection | None = None
        self._auto: radius.AutoRadius | None = None
        self._loss: Tensor | None = None  # of the step that is being taken, as is gamma
        self._gamma: Tensor | None = None
        self._bound: Tensor | float = math.inf  # the radius, where it sets itself
        self._halves: list[int] = []  # of a power iteration: whose turn it is on each layer

    @property
    def depends_on_length(self) -> bool:
        return self.options.rho_schedule != "constant"

    def inject_others(self) -> None:
        # Eq. 7. B2 starts at zero; whatever the primary's init, A2 is kaiming-uniform.
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
        self._scales = radius.scales(self._layers, self.options.rho_norm)
        count, dealt = deal(self.options.auxiliaries, self.options.sample_names)
        if self.sets_rho:
            rise = radius.RISE if count == 1 else radius.RISE_BY_SAMPLE
            self._auto = radius.AutoRadius(self.options.loss_rise or rise)
            self._primary = radius.scales(self._layers, self.options.rho_norm, PRIMARY)
        if count > 1:
            layers = [adapters.layers(target.model, AUXILIARY) for target in self.targets]
            parked = self.options.auxiliaries_on == "cpu"
            self._many = Auxiliaries(layers, self._scales, count, dealt, parked)
        if self._power:
            ascent.orthonormalize_rows_(self._factors())
            self._halves = [0] * len(self._layers)

    def expect(self, samples: Sequence[int | None]) -> None:
        if self._many is not None:
            self._many.expect(samples)

    def seen(self, samples: Sequence[int | None]) -> AbstractContextManager[None]:
        return super().seen(samples) if self._many is None else self._many.seen(samples)

    def apart(self) -> list[nn.Parameter]:
        return [] if self._many is None else self._many.parameters()

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        # Eq. 9: descent on B1, A1 with eta_1, ascent on B2, A2 with eta_2, both from one gradient.
        groups, many = super().param_groups(targets), self._many
        if many is not None:
            many.follow()
        for number, target in enumerate(targets):
            own = many.parameters(number) if many else adapters.parameters(target.model, AUXILIARY)
            groups.append(
                {
                    "params": own,
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

        An optimizer that knows no `maximize` (all but torch's) is given the auxiliary's
        negated gradients, which is the same for a group without weight decay.

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
        self._hooks = []
        if self._many is not None:
            many = self._many
            self._hooks.append(optimizer.register_step_pre_hook(lambda o, *_: many.before_step(o)))
        if self._auto is not None:  # before the gradients are turned
            self._hooks.append(optimizer.register_step_pre_hook(self._look))
        if self._power:
            self._hooks.append(optimizer.register_step_pre_hook(self._power_step))
        elif self._climbs and "maximize" not in optimizer.defaults:
            self._hooks.append(optimizer.register_step_pre_hook(refuse_closure))
            self._hooks.append(optimizer.register_step_pre_hook(self._negate))
            self._hooks.append(optimizer.register_step_post_hook(self._negate))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        self._optimizer = optimizer
        self._shrinking = ascent.shrinking(optimizer, self.options.rescale_moments)

    def check_groups(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that does not climb on the auxiliary.

        Raises:
            UserError: its groups are not those of `param_groups`.
        """
        primary = [p for target in self.targets for p in trained(target.model)]
        check_groups(optimizer, primary, self._parameters(), self._climbs)

    def project(self) -> ball.Projection:
        """Clip the auxiliary to the ball, over the layers of all targets (Eq. 10)."""
        if self._many is not None:
            return self._many.project_(range(self._many.count), self._radius())
        return self._project(self._measured())

    def _project(
        self, factors: Sequence[adapters.Factors], measured: ball.Squares | None = None
    ) -> ball.Projection:
        if self.options.ball == "none":
            norm = (ball.squares(factors) if measured is None else measured).total()
            return ball.Projection(norm, norm, torch.ones_like(norm))
        each = self.options.ball == "per-layer"
        last = ball.project_(factors, self._radius(), self._power, each, measured)
        if self._shrinking and self._optimizer is not None:
            parameters = self._parameters()
            ascent.shrink_(self._optimizer, parameters, last.factor, self._shrinking, each)
        return last._replace(factor=last.factor.amin())

    def auxiliary_norm(self) -> float:
        """The auxiliary's total norm in the units of `rho_norm`; the largest of several."""
        if self._many is not None:
            return float(self._many.norms.amax())
        return float(ball.frobenius_norm(self._measured()))

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        def observed() -> Tensor:
            loss = forward_backward()
            self.observe(loss)
            return loss

        return super().step(observed, optimizer)

    def observe(self, loss: Tensor) -> None:
        """Tell the loss whose gradient the optimizer's next step takes, 0-d, over all micro-batches
        and processes: rho "auto" needs it.
        """
        self._loss = loss.detach()

    def metrics(self) -> dict[str, float]:
        """The norm before and after the last projection (of several auxiliaries the largest), and
        what rho "auto" has found.
        """
        if self._last is None:
            return {}
        return {
            "auxiliary_norm_before": float(self._last.before),
            "auxiliary_norm": float(self._last.after),
            **({} if self._auto is None else self._auto.metrics()),
        }

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        if self._many is None:
            return tensors
        # The layers' own parameters are views of the last ones seen.
        others = {key: t for key, t in tensors.items() if key.split("/")[1] != AUXILIARY}
        return others | self._many.tensors([target.name for target in self.targets])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._many is not None:
            state["norms"] = self._many.norms.tolist()
        if self._power:
            state["halves"] = list(self._halves)
        if self._auto is not None:
            state["radius"] = self._auto.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._halves = list(state.get("halves", ()))
        if self._auto is not None:
            self._auto.load_state_dict(state["radius"], self._factors()[0].A.device)
            self._bound = math.inf if self._auto.rho is None else self._auto.rho
        if self._many is not None:
            self._many.norms.copy_(torch.tensor(state["norms"]))

    @property
    def sets_rho(self) -> bool:
        """Whether the radius sets itself."""
        return self.options.rho == AUTO

    def _measured(self) -> list[adapters.Factors]:
        """The factors with what their norm is multiplied with as scale."""
        pairs = zip(self._factors(), self._scales, strict=True)
        return [factors._replace(scale=scale) for factors, scale in pairs]

    def _factors(self) -> list[adapters.Factors]:
        return adapters.factors_of(self._layers, AUXILIARY)

    @property
    def _climbs(self) -> bool:
        return self.options.auxiliary_direction == "ascent"

    @property
    def _power(self) -> bool:
        return self.options.auxiliary_update == "power"

    def _radius(self) -> float | Tensor:
        """rho of the step that is being taken."""
        if self._auto is not None:
            return self._bound
        if not self.depends_on_length:
            return self.rho
        progress = self.options.progress(max(1, self.taken))
        return self.rho * rising(self.options.rho_schedule, progress)

    def _look(self, *_: Any) -> None:
        if self._loss is None:
            raise UserError(
                'rho "auto" measures the auxiliary by the loss; call observe(loss) before each '
                "optimizer.step()."
            )
        if self._many is not None:
            moving = self._many.moving()
            self._gamma = self._many.rise(moving) if moving else None
            return
        ups = [adapters.weights(layer, AUXILIARY)[1] for _, layer in self._layers]
        both = [(ball.whole(B), ball.whole(B.grad)) for B in ups if B.grad is not None]
        self._gamma = perturb.dot([B for B, _ in both], [g for _, g in both])

    def _after_step(self, *_: Any) -> None:
        self.taken += 1
        moving = [] if self._many is None else self._many.moving()
        if self._many is not None and not moving:
            return  # no row was a sample
        auxiliary = self._measured() if self._many is None else []
        measured = None
        if self._auto is not None and self._loss is not None and self._gamma is not None:
            primary = radius.changes(self._layers, self._primary)
            both = ball.squares([*auxiliary, *primary])  # of one shape mostly, so at one go
            count = len(auxiliary)
            moved, measured = both.of(slice(count, None)).total(), both.of(slice(count))
            norm = None if self._many is None else self._many.norms[moving].mean()
            self._bound = self._auto.update(self._loss, self._gamma, moved, norm)
            self._loss = None  # each step tells its own
        if self._many is None:
            self._last = self._project(auxiliary, measured)
        else:
            self._last = self._many.project_(moving, self._radius())
            assert self._optimizer is not None
            self._many.release(self._optimizer)
        if self._auto is not None:
            self._auto.projected(self._last.after)

    def _power_step(self, *_: Any) -> None:
        gradients = adapters.gradients_of(self._layers, AUXILIARY)
        sign = 1.0 if self._climbs else -1.0
        self._halves = ascent.power_step_(self._factors(), gradients, self._halves, sign)
        for parameter in self._parameters():
            parameter.grad = None  # the optimizer passes over what has no gradient, and keeps none

    def _parameters(self) -> list[nn.Parameter]:
        """What the optimizer has of the auxiliary, or of all of them."""
        if self._many is not None:
            return self._many.parameters()
        return [w for _, layer in self._layers for w in adapters.weights(layer, AUXILIARY)]

    def _negate(self, *_: Any) -> None:
        own = self._parameters()
        if gradients := [p.grad for p in own if p.grad is not None]:
            torch._foreach_neg_(gradients)
