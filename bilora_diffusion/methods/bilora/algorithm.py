"""Bi-LoRA (Algorithm 1): the primary descends, the auxiliary ascends within a ball."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ... import adapters
from ...adapters import AUXILIARY, PRIMARY
from ...core.errors import UserError
from ...core.values import AUTO
from ..base import CountingMethod, MethodOptions, StepOptimizer, Target, TrainedBytes, unwrapped
from ..registry import register
from . import ball
from .auxiliary import Auxiliary, Layers, PerLayerAuxiliary, UnboundedAuxiliary, norm_scales
from .per_sample import Assignment, SampleAuxiliaries, assign
from .radius import AutoRadius


@register("bilora")
class BiLoRA(CountingMethod):
    """min over B1, A1, max over ||B2 A2||_F <= rho of L(W0 + B1 A1 + B2 A2)  (Eqs. 7 and 8).

    The total norm runs over the layers of all targets. Gradient clipping sees the primary only.

    Attributes:
        auxiliary: B2 and A2: one pair for all samples, or one for each sample or group of them;
            set by `inject_adapters`.
        radius: a radius that sets itself (`--rho auto`), else None.
        projection: the last step's projection onto the ball; None before the first.
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
            "loss_rise",
            "rho_norm",
            "ball",
            "auxiliaries",
            "auxiliary_rank",
            "auxiliary_alpha",
            "auxiliary_learning_rate",
            "auxiliary_direction",
            "auxiliary_snr_gamma",
        }
    )
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType(
        {"auxiliary_learning_rate": 0.0}
    )

    auxiliary: Auxiliary
    radius: AutoRadius | None = None
    projection: ball.Projection | None = None

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self.assignment = assign(self.options.auxiliaries, self.options.sample_names)
        # The auxiliary descends in an ablation of Eq. 9.
        self.is_ascending = self.options.auxiliary_direction == "ascent"
        self.optimizer: Optimizer | None = None
        self._hooks: list[RemovableHandle] = []

    def inject_adapters(self) -> None:
        # Eq. 7: W = W0 + s1 B1 A1 + s2 B2 A2. Whatever the primary's init, A2 is kaiming-uniform
        # and B2 zero. Without dropout, since B2 A2 perturbs the weights for every input alike.
        super().inject_adapters()
        for target in self.targets:
            spec = replace(
                target.spec,
                rank=self.options.auxiliary_rank or target.spec.rank,
                alpha=self.options.auxiliary_alpha or target.spec.alpha,
                dropout=0.0,
                init="default",
                use_dora=False,
            )
            adapters.inject(target.model, spec, AUXILIARY)
        layers = [adapters.layers(target.model, AUXILIARY) for target in self.targets]
        self.auxiliary = create_auxiliary(layers, self.options, self.assignment)
        self.loose_parameters = self.auxiliary.loose_parameters
        if self.options.rho == AUTO:
            self.radius = AutoRadius(layers, self.options, self.auxiliary.count)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        # Eq. 9: descent on B1, A1 with eta_1, ascent on B2, A2 with eta_2, both from one gradient.
        self.auxiliary.follow_models()
        groups = super().param_groups(targets)
        for model, target in enumerate(targets):
            groups.append(
                {
                    "params": self.auxiliary.parameters(model),
                    "lr": auxiliary_rate(self.options, target.lr, targets[0].lr),
                    "weight_decay": 0.0,
                    "maximize": self.is_ascending,
                    "name": f"{target.name}.{AUXILIARY}",
                }
            )
        return groups

    def bind(self, optimizer: Optimizer) -> None:
        """Ascend on the auxiliary and project it in each step of `optimizer` that is taken.

        Raises:
            UserError: it is bound already, its groups are not those of `param_groups`, or it can't
                have hooks.
        """
        optimizer = unwrapped(optimizer)
        if optimizer is self.optimizer:
            raise UserError("bind got the same optimizer twice; call it once, after making it.")
        self.check_groups(optimizer)
        super().bind(optimizer)
        for hook in self._hooks:
            hook.remove()
        # They run in this order, with unscaled and clipped gradients; none runs in a step that a
        # gradient scaler skips.
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        if self.is_ascending and "maximize" not in optimizer.defaults:
            self._hooks += self._turn_gradients(optimizer)
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        self.optimizer = optimizer

    def check_groups(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that would not move the adapters as Eq. 9 does.

        Raises:
            UserError: its groups are not those of `param_groups`.
        """
        fix = "make the optimizer from param_groups() as it is."
        # By identity: `==` of tensors compares their values.
        auxiliary_ids = set(map(id, self.auxiliary.parameters()))
        primary_ids = set(map(id, self.result_parameters()))
        # A parameter that is in no group would never be trained.
        missing_ids = auxiliary_ids | primary_ids
        for group in optimizer.param_groups:
            group_ids = set(map(id, group["params"]))
            missing_ids -= group_ids
            # Groups that were not made by `param_groups` may lack these keys.
            maximize = bool(group.get("maximize", False))
            decay = group.get("weight_decay", 0)
            foreign_ids = group_ids - auxiliary_ids
            # Weight decay would pull the auxiliary to zero, against its ascent.
            is_right = not foreign_ids and maximize == self.is_ascending and decay == 0
            if group_ids & auxiliary_ids and not is_right:
                raise UserError(
                    f"The auxiliary's group has maximize={maximize}, weight_decay={decay} and "
                    f"{len(foreign_ids)} foreign parameters; {fix}"
                )
            if group_ids & primary_ids and maximize:
                raise UserError(
                    f"A group with maximize=True holds parameters of the primary; {fix}"
                )
        if missing_ids:
            raise UserError(
                f"The optimizer lacks {len(missing_ids)} parameters of the adapters; {fix}"
            )

    def _turn_gradients(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Change the sign of the auxiliary's gradients during each step, and change it back.

        For an optimizer that does not know ``maximize`` this is the same, since the auxiliary has
        no weight decay.
        """

        def change_signs(*_: Any) -> None:
            gradients = [p.grad for p in self.auxiliary.parameters() if p.grad is not None]
            if gradients:
                torch._foreach_neg_(gradients)

        # `step(closure)` computes the gradients after the pre-hooks, so their signs would stay.
        def refuse_closure(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step_arguments = [*args[1:], *kwargs.values()]  # without the optimizer itself
            if any(argument is not None for argument in step_arguments):
                raise UserError(
                    f"{type(optimizer).__name__} knows no maximize and was given a closure, in "
                    "which the auxiliary's gradients can't be turned; call step() without one."
                )

        return [
            optimizer.register_step_pre_hook(refuse_closure),
            optimizer.register_step_pre_hook(change_signs),
            optimizer.register_step_post_hook(change_signs),
        ]

    def around_batch(
        self, samples: Sequence[int | None], snr: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        return self.auxiliary.around_batch(samples, snr)

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        loss = forward_backward()
        self.observe(loss)
        optimizer.step()  # between `_before_step` and `_after_step`, unless a scaler skips it
        optimizer.zero_grad()
        return loss

    def observe(self, loss: Tensor) -> None:
        """Take the loss of the coming step, 0-d, over all micro-batches and processes."""
        if self.radius is not None:
            self.radius.observe(loss)

    def _before_step(self, *_: Any) -> None:
        self.auxiliary.check_gradients()
        if self.radius is not None:
            self.radius.before_step(self.auxiliary)

    def _after_step(self, *_: Any) -> None:
        self.steps_taken += 1
        active = self.auxiliary.active()
        if active:  # else no row of the step was a sample
            rho: float | Tensor = self.rho
            if self.radius is not None:
                rho = self.radius.after_step(self.auxiliary)
            # Eq. 10: (A2, B2) <- sqrt(rho / c) (A2, B2) where c = ||B2 A2||_F exceeds rho.
            self.projection = self.auxiliary.project_(active, rho)
            if self.radius is not None:
                self.radius.after_projection(self.projection.after)
        self.auxiliary.forget_gradients()

    def auxiliary_norm(self) -> float:
        """The auxiliary's total norm in the units of `rho_norm`; the largest of several."""
        return float(self.auxiliary.norm())

    def metrics(self) -> dict[str, float]:
        """Norms before and after the last projection (the largest of several), and the radius."""
        if self.projection is None:
            return {}
        metrics = {
            "auxiliary_norm_before": float(self.projection.before),  # c of Eq. 10
            "auxiliary_norm": float(self.projection.after),
        }
        # "rho" and "loss_rise" are logged only where the radius sets itself.
        if self.radius is not None:
            metrics |= self.radius.metrics()
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        auxiliary_tensors = self.auxiliary.tensors([target.name for target in self.targets])
        if auxiliary_tensors:  # then the layers' own parameters of the auxiliary are not used
            for key in list(tensors):
                _, adapter, _ = key.split("/", maxsplit=2)
                if adapter == AUXILIARY:
                    del tensors[key]
        return tensors | auxiliary_tensors

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # The auxiliary itself is among the tensors, and its moments in the optimizer's state.
        if self.radius is not None:
            state |= self.radius.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.radius is not None:
            self.radius.load_state_dict(state)

    def memory(self, step_samples: int) -> TrainedBytes:
        trained = super().memory(step_samples)
        # Auxiliaries of samples replace the layers' own, so their parameters are counted.
        auxiliary_bytes = sum(parameter.nbytes for parameter in self.auxiliary.parameters())
        # At most as many auxiliaries have a gradient in one step as it has samples.
        count = self.auxiliary.count
        gradient_bytes = auxiliary_bytes // count * min(count, step_samples)
        return TrainedBytes(
            {**trained.adapters, AUXILIARY: auxiliary_bytes},
            gradients=trained.gradients + gradient_bytes,
            optimized=trained.optimized + auxiliary_bytes,
            result=trained.result,
        )


def create_auxiliary(
    layers: Sequence[Layers], options: MethodOptions, assignment: Assignment
) -> Auxiliary:
    """Make the kind of auxiliary that the options ask for, on adapters that are injected."""
    scales: list[float] = []
    for model_layers in layers:
        scales += norm_scales(model_layers, options.rho_norm)
    if assignment.count > 1:
        return SampleAuxiliaries(layers, scales, assignment, options.auxiliary_snr_gamma)
    kinds = {"global": Auxiliary, "per-layer": PerLayerAuxiliary, "none": UnboundedAuxiliary}
    return kinds[options.ball](layers, scales)


def auxiliary_rate(options: MethodOptions, rate: float, first_rate: float) -> float:
    """eta_2 of Eq. 9 for one of the models that are trained together.

    A rate that is given is that of the first model. The others' keep the ratio that the primaries
    have: text encoders are trained more slowly than the denoiser.

    Args:
        options: the method's, with ``auxiliary_learning_rate``.
        rate: learning rate of the model's primary.
        first_rate: learning rate of the first model's primary.

    Raises:
        UserError: the first model's rate is 0, so there is no ratio.
    """
    given_rate = options.auxiliary_learning_rate
    if given_rate is None:
        return rate  # eta_2 = eta_1, as in the paper's experiments (Appendix G)
    if rate == first_rate:
        return given_rate
    if first_rate == 0:
        raise UserError(
            "The learning rate of the first model is 0, so auxiliary_learning_rate"
            f" {given_rate} has no ratio to keep for the others; leave it out."
        )
    return given_rate * rate / first_rate
