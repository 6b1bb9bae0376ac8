"""LoRA-MSAM: the gradient is taken where the optimizer's momentum leads (Becker et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import UserError
from . import perturb
from .base import Method, StepOptimizer
from .hooks import unwrapped
from .registry import register

MOMENTA = ("exp_avg", "momentum_buffer")
"""The momentum's names in an optimizer's state: of Adam's family with Prodigy, and of SGD."""


@register("lora-msam")
class LoRAMSAM(Method):
    """The gradient at w - rho v / ||v||, v the optimizer's momentum, one norm over all weights.

    So the weights are moved on in the direction of the last steps. The step itself is taken from w;
    it costs one pass. On AdamW v is the first moment, whose bias correction falls out of the ratio.
    Nothing is moved before the first step. The logged loss is that of the moved weights; a resume
    needs nothing beside the optimizer's state.

    Source: https://arxiv.org/abs/2401.12033, Algorithm 1, on LoRA's parameters.
    """

    title = "LoRA-MSAM"
    summary = (
        "Trained with Momentum-SAM on the adapter: each gradient is taken at the adapter moved by "
        "rho against the optimizer's momentum."
    )

    reads: ClassVar[frozenset[str]] = frozenset({"rho"})
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({"rho": 1e-30})

    optimizer: Optimizer | None = None

    def bind(self, optimizer: Optimizer) -> None:
        """Read the momentum of `optimizer` before each step.

        Raises:
            UserError: it keeps none, or none that can be read.
        """
        super().bind(optimizer)
        optimizer = unwrapped(optimizer)
        for group in optimizer.param_groups:
            # Adam's family names its momentum by the first of the betas.
            momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
            if not momentum:
                raise UserError(
                    "lora-msam moves the weights by the momentum, of which "
                    f"{type(optimizer).__name__} as it is set keeps none; use AdamW, or SGD with "
                    "momentum=0.9."
                )
        self.optimizer = optimizer

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        # Before the first step, and where the loss does not reach, there is no momentum.
        weights, momenta = list[nn.Parameter](), list[Tensor]()
        for weight in self.weights:
            momentum = self._momentum(weight)
            if momentum is not None:
                weights.append(weight)
                momenta.append(momentum)
        with perturb.restored(weights):
            perturb.move_(weights, momenta, -self.rho)  # w - rho v / ||v||
            loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def _momentum(self, weight: nn.Parameter) -> Tensor | None:
        """v of one weight; None before the first step that moved it."""
        assert self.optimizer is not None, "bind() comes first"
        # Read anew each time: a resume replaces the state.
        state = self.optimizer.state.get(weight)
        if not state:
            return None
        for name in MOMENTA:
            if state.get(name) is not None:
                return state[name]
        raise UserError(
            f"lora-msam moves the weights by the momentum, and {type(self.optimizer).__name__} "
            f"keeps none that can be read, only {', '.join(map(str, state))}; use AdamW."
        )
