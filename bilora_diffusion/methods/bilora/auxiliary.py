"""The auxiliary adapter: its shape, its norm, and how an optimizer ascends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ... import adapters
from ...adapters import AUXILIARY, AdapterSpec
from ...core.errors import UserError
from ..base import MethodOptions


def auxiliary_spec(options: MethodOptions, primary: AdapterSpec) -> AdapterSpec:
    """Return the shape of the auxiliary for a primary of this shape.

    Whatever the primary's init, A2 is kaiming-uniform and B2 zero. It has no dropout, since B2 A2
    perturbs the weights for every input alike.
    """
    return replace(
        primary,
        rank=options.auxiliary_rank or primary.rank,
        alpha=options.auxiliary_alpha or primary.alpha,
        dropout=0.0,
        init="default",
        use_dora=False,
    )


def auxiliary_factors(
    layers: Sequence[tuple[str, adapters.LoraLayer]], rho_norm: str
) -> list[adapters.Factors]:
    """A2 and B2 of each layer, with the factor on the norm of B2 A2 that `rho_norm` asks for."""
    factors = adapters.factors_of(layers, AUXILIARY)
    if rho_norm == "unscaled":
        # Eq. 10 to the letter: the paper leaves s out after Eq. 1.
        return [layer_factors._replace(scale=1.0) for layer_factors in factors]
    return factors


def check_groups(
    optimizer: Optimizer, primary: Sequence[nn.Parameter], auxiliary: Sequence[nn.Parameter]
) -> None:
    """Refuse an optimizer that would not move the adapters as Eq. 9 does.

    Raises:
        UserError: its groups are not those of `param_groups`.
    """
    fix = "make the optimizer from param_groups() as it is."
    # By identity: `==` of tensors compares their values.
    auxiliary_ids = set(map(id, auxiliary))
    primary_ids = set(map(id, primary))
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
        ascends = not foreign_ids and maximize and decay == 0
        if group_ids & auxiliary_ids and not ascends:
            raise UserError(
                f"The auxiliary's group has maximize={maximize}, weight_decay={decay} and "
                f"{len(foreign_ids)} foreign parameters; {fix}"
            )
        if group_ids & primary_ids and maximize:
            raise UserError(f"A group with maximize=True holds parameters of the primary; {fix}")
    if missing_ids:
        raise UserError(f"The optimizer lacks {len(missing_ids)} parameters of the adapters; {fix}")


def turn_gradients(
    optimizer: Optimizer, auxiliary: Sequence[nn.Parameter]
) -> list[RemovableHandle]:
    """Change the sign of the auxiliary's gradients during each step, and change it back.

    For an optimizer that does not know ``maximize`` this is the same, since the auxiliary has no
    weight decay.
    """

    def change_signs(*_: Any) -> None:
        gradients = [p.grad for p in auxiliary if p.grad is not None]
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
