"""The auxiliary adapter: its shape, its factors, and the optimizer's ascent on it."""

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

    For every init of the primary, A2 is kaiming-uniform and B2 is zero. The auxiliary has no
    dropout, since B2 A2 perturbs the weights in the same way for every input.
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
    """Return A2 and B2 of each layer, with the scale that `rho_norm` selects for their norm."""
    factors = adapters.factors_of(layers, AUXILIARY)
    if rho_norm == "unscaled":
        # Eq. 10 as printed: the paper omits s after Eq. 1.
        return [layer_factors._replace(scale=1.0) for layer_factors in factors]
    return factors


def check_groups(
    optimizer: Optimizer, primary: Sequence[nn.Parameter], auxiliary: Sequence[nn.Parameter]
) -> None:
    """Check that an optimizer moves the adapters as in Eq. 9.

    Raises:
        UserError: the optimizer's groups are not those of `param_groups`.
    """
    fix = "create the optimizer from param_groups() without changing the groups."
    # Parameters are compared by identity, since `==` compares the values of tensors.
    auxiliary_ids = set(map(id, auxiliary))
    primary_ids = set(map(id, primary))
    # A parameter that is in no group would never be trained.
    missing_ids = auxiliary_ids | primary_ids
    for group in optimizer.param_groups:
        group_ids = set(map(id, group["params"]))
        missing_ids -= group_ids
        # Groups that do not come from `param_groups` may lack these keys.
        maximize = bool(group.get("maximize", False))
        decay = group.get("weight_decay", 0)
        foreign_ids = group_ids - auxiliary_ids
        # Weight decay would pull the auxiliary towards zero, against its ascent.
        ascends = not foreign_ids and maximize and decay == 0
        if group_ids & auxiliary_ids and not ascends:
            raise UserError(
                f"The auxiliary's group has maximize={maximize}, weight_decay={decay} and "
                f"{len(foreign_ids)} other parameters; {fix}"
            )
        if group_ids & primary_ids and maximize:
            raise UserError(f"A group with maximize=True contains the primary's parameters; {fix}")
    if missing_ids:
        raise UserError(f"The optimizer lacks {len(missing_ids)} trained parameters; {fix}")


def turn_gradients(
    optimizer: Optimizer, auxiliary: Sequence[nn.Parameter]
) -> list[RemovableHandle]:
    """Add hooks that flip the sign of the auxiliary's gradients during each optimizer step.

    They replace ``maximize=True`` for an optimizer without this option. The effect is the same,
    since the auxiliary has no weight decay.

    Returns:
        Handles of the hooks.
    """

    def change_signs(*_: Any) -> None:
        gradients = [p.grad for p in auxiliary if p.grad is not None]
        if gradients:
            torch._foreach_neg_(gradients)

    # `step(closure)` computes the gradients after the pre-hooks, so their signs would not flip.
    def refuse_closure(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step_arguments = [*args[1:], *kwargs.values()]  # without the optimizer itself
        if any(argument is not None for argument in step_arguments):
            raise UserError(
                f"{type(optimizer).__name__} has no maximize option and got a closure, in which "
                "the sign of the auxiliary's gradients can't be flipped; call step() without one."
            )

    return [
        optimizer.register_step_pre_hook(refuse_closure),
        optimizer.register_step_pre_hook(change_signs),
        optimizer.register_step_post_hook(change_signs),
    ]
