"""Reaching the optimizer's own steps."""

from __future__ import annotations

from typing import Any, cast

from torch.optim import Optimizer

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
