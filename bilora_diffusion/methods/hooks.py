"""Reaching the optimizer's own steps, and what an optimizer must be for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import UserError


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside what accelerate or a scheduler may have wrapped around it.

    Raises:
        UserError: there is none that hooks can be put on.
    """
    while "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(
                f"bind got a {type(optimizer).__name__}, which is not a torch.optim.Optimizer and "
                "can't be hooked; give the torch optimizer."
            )
        optimizer = cast(Any, optimizer).optimizer
    return optimizer


def check_groups(
    optimizer: Optimizer,
    primary: Sequence[nn.Parameter],
    auxiliary: Sequence[nn.Parameter],
    climbs: bool,
) -> None:
    """Refuse an optimizer that would not move the auxiliary as Eq. 9 does, apart from the primary.

    Args:
        climbs: whether the auxiliary's groups have ``maximize=True``.

    Raises:
        UserError: its groups are not those of `param_groups`.
    """
    auxiliary_ids, primary_ids = {id(p) for p in auxiliary}, {id(p) for p in primary}
    missing = auxiliary_ids | primary_ids
    fix = "make the optimizer from param_groups() as it is."
    for group in optimizer.param_groups:
        ids = {id(p) for p in group["params"]}
        missing -= ids
        ascends, decay = bool(group.get("maximize", False)), group.get("weight_decay", 0)
        if ids & auxiliary_ids and (ids - auxiliary_ids or ascends != climbs or decay != 0):
            raise UserError(
                f"The auxiliary's group has maximize={ascends}, weight_decay={decay} and "
                f"{len(ids - auxiliary_ids)} foreign parameters; {fix}"
            )
        if ids & primary_ids and ascends:
            raise UserError(f"A group with maximize=True holds parameters of the primary; {fix}")
    if missing:
        raise UserError(f"The optimizer lacks {len(missing)} parameters of the adapters; {fix}")


def ascend(
    optimizer: Optimizer, parameters: Callable[[], Sequence[nn.Parameter]]
) -> list[RemovableHandle]:
    """Turn these gradients around during each step, for an optimizer that knows no ``maximize``:
    the same for a group without weight decay.

    Raises (from the steps):
        UserError: `step` was given a closure, which is called too late.
    """

    def turn(*_: Any) -> None:
        if gradients := [p.grad for p in parameters() if p.grad is not None]:
            torch._foreach_neg_(gradients)

    def refuse_closure(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UserError(
                f"{type(optimizer).__name__} knows no maximize and was given a closure, in which "
                "the auxiliary's gradients can't be turned; call step() without one."
            )

    return [
        optimizer.register_step_pre_hook(refuse_closure),
        optimizer.register_step_pre_hook(turn),
        optimizer.register_step_post_hook(turn),
    ]
