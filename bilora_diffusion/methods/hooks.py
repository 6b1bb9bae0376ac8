"""Hooks on the optimizer's own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.errors import UserError
from .base import Method


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside what accelerate or a scheduler may have wrapped around it.

    Raises:
        UserError: there is none that hooks can be put on.
    """
    # accelerate's wrapper is a torch optimizer by its class, but has no hooks of its own.
    while "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(
                f"bind got a {type(optimizer).__name__}, which is not a torch.optim.Optimizer and "
                "can't be hooked; give the torch optimizer."
            )
        optimizer = cast(Any, optimizer).optimizer
    return optimizer


class HookedMethod(Method):
    """A method that acts on the layers' gradients or factors before each step that is taken.

    Steps that a gradient scaler skips call nothing.
    """

    _hook: RemovableHandle | None = None

    def bind(self, optimizer: Optimizer) -> None:
        """Call `before_step` before every step of `optimizer`.

        Raises:
            UserError: it can't be hooked.
        """
        super().bind(optimizer)
        if self._hook is not None:  # bound before: the latest optimizer holds
            self._hook.remove()
        self._hook = unwrapped(optimizer).register_step_pre_hook(self.before_step)

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Act before a step of `optimizer`; torch also hands over the step's arguments."""
        raise NotImplementedError


def turn_gradients(
    optimizer: Optimizer, parameters: Callable[[], Sequence[nn.Parameter]]
) -> list[RemovableHandle]:
    """Change the sign of these gradients during each step, and change it back after it.

    For an optimizer that does not know ``maximize`` that is the same, as long as the group has no
    weight decay.

    Raises (from the steps):
        UserError: `step` was given a closure, which is called too late.
    """

    def change_signs(*_: Any) -> None:
        gradients = [p.grad for p in parameters() if p.grad is not None]
        if gradients:
            torch._foreach_neg_(gradients)

    # `step(closure)` computes the gradients after the pre-hooks, so their signs would stay.
    def refuse_closure(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UserError(
                f"{type(optimizer).__name__} knows no maximize and was given a closure, in which "
                "the auxiliary's gradients can't be turned; call step() without one."
            )

    return [
        optimizer.register_step_pre_hook(refuse_closure),
        optimizer.register_step_pre_hook(change_signs),
        optimizer.register_step_post_hook(change_signs),
    ]
