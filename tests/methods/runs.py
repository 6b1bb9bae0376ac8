"""A method in float64 on two layers, beside which the literal references are run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.methods import Method, MethodOptions, Target, create
from tests.references import methods as reference

SPEC = AdapterSpec(rank=3, alpha=6, target_modules=("0", "2"))
STEPS = 50


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


def naive(run: Run) -> reference.Net:
    """The layers as the reference has them, with an optimizer as the run's for each matrix."""
    first, *auxiliary_groups = run.optimizer.param_groups
    primary_names = ("W0", "b") if run.method.exports_weights else ("A", "B")
    groups = [(primary_names, first), *((("A2", "B2"), group) for group in auxiliary_groups[:1])]
    make = getattr(reference, type(run.optimizer).__name__)
    rules = [
        {
            name: make(group["lr"], group["weight_decay"], group.get("maximize", False))
            for names, group in groups
            for name in names
        }
        for _ in range(2)
    ]
    layers = []
    for path, module in (("0", run.model[0]), ("2", run.model[2])):
        base = getattr(module, "base_layer", module)
        factors = [
            {f.name: f for f in adapters.factors(run.model, name)}[path]
            for name in run.method.adapters
        ]
        values: list[Any] = [v for f in factors for v in (f.A.clone(), f.B.clone(), f.scale)]
        values = values or [torch.zeros(0), torch.zeros(0), 1.0]
        weight, bias = (p.detach().clone() for p in (base.weight, base.bias))
        layers.append(reference.Layer(weight, bias, *values))
    return reference.Net(layers, rules)


def assert_same_layers(run: Run, net: reference.Net) -> None:
    """All that is trained is as the reference has it."""
    for layer, run_layer in zip(net.layers, naive(run).layers, strict=True):
        for name in ("W0", "b", "A", "B", "A2", "B2"):
            expected, value = getattr(layer, name), getattr(run_layer, name)
            assert (expected is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def follow(
    run: Run, step: Callable[[reference.Net, Tensor, Tensor], float], warmup: int = 0
) -> reference.Net:
    """The run takes the reference's steps, which is returned.

    Args:
        warmup: steps in which all learning rates rise from 0, linearly.
    """
    net, expected = naive(run), []
    rules = [rule for of_layer in net.rules for rule in of_layer.values()]
    rates = [rule.lr for rule in rules]
    for net.k in range(STEPS):
        for rule, rate in zip(rules, rates, strict=True):
            rule.lr = rate * rising(net.k, warmup)
        expected.append(step(net, *batch(net.k)))
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda k: rising(k, warmup))
    losses = []
    for k in range(STEPS):
        losses += run.train(1, first=k)
        schedule.step()
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    assert_same_layers(run, net)
    return net


def rising(step: int, warmup: int) -> float:
    """Factor on the learning rate at a step, from 0."""
    return min(1.0, step / warmup) if warmup else 1.0
