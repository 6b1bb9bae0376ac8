"""A method in float64 on two layers, beside which the literal references are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.methods import Method, MethodOptions, Target, create

SPEC = AdapterSpec(rank=3, alpha=6, target_modules=("0", "2"))
STEPS = 20


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + k)
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    return x, torch.randn(7, 5, dtype=torch.float64, generator=generator)


class Run:
    """A method with its optimizer; the batches are the same for all.

    Args:
        kind: an optimizer, or the name of one of torch.
        bound: whether the method knows the optimizer.
    """

    def __init__(
        self,
        name: str,
        options: MethodOptions | None = None,
        kind: Any = "AdamW",
        lr: float = 5e-3,
        decay: float = 0.0,
        spec: AdapterSpec = SPEC,
        bound: bool = True,
    ) -> None:
        self.model: Any = two_layers()
        self.method: Method = create(name, options)
        torch.manual_seed(1)
        self.groups = self.method.setup([Target("model", self.model, spec, lr, decay)])
        make = getattr(torch.optim, kind) if isinstance(kind, str) else kind
        self.optimizer: torch.optim.Optimizer = make(self.groups)
        if bound:
            self.method.bind(self.optimizer)
        self.passes = 0

    def backward(self, k: int = 0) -> Tensor:
        """One pass over `batch(k)`; the loss."""
        self.passes += 1
        x, y = batch(k)
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        return loss.detach()

    def train(
        self, steps: int = STEPS, first: int = 0, backward: Callable[[int], Tensor] | None = None
    ) -> list[float]:
        """Steps on `batch(first)` and those after it, or with passes of another kind."""
        work = backward or self.backward
        return [
            float(self.method.step(lambda k=k: work(k), self.optimizer))
            for k in range(first, first + steps)
        ]

    def primary(self) -> dict[str, Tensor]:
        return adapters.state_dict(self.model, PRIMARY)


def frozen(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of the weight and bias under each layer's adapters."""
    bases = [cast(Any, layer).base_layer for _, layer in adapters.layers(model)]
    return [(base.weight.detach().clone(), base.bias.detach().clone()) for base in bases]
