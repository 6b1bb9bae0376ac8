"""Small runs of a method in float64, and their comparison with the literal references."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
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
    """A method on two layers, with its optimizer. All runs use the same batches.

    Args:
        kind: optimizer class, or the name of an optimizer of torch.
        bound: whether to bind the method to the optimizer.
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
        # The adapters start from the same values in all runs.
        torch.manual_seed(1)
        self.groups = self.method.setup([Target("model", self.model, spec, lr, decay)])
        if isinstance(kind, str):
            kind = getattr(torch.optim, kind)
        self.optimizer: torch.optim.Optimizer = kind(self.groups)
        if bound:
            self.method.bind(self.optimizer)
        self.passes = 0

    def backward(self, k: int = 0) -> Tensor:
        """Compute the gradients on `batch(k)` and return the loss."""
        self.passes += 1
        x, y = batch(k)
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        return loss.detach()

    def train(
        self, steps: int = STEPS, first: int = 0, backward: Callable[[int], Tensor] | None = None
    ) -> list[float]:
        """Train on `batch(first)` and the following ones, and return the losses.

        Args:
            backward: replaces `Run.backward`.
        """
        losses = []
        for k in range(first, first + steps):
            forward_backward = partial(backward or self.backward, k)
            losses.append(float(self.method.step(forward_backward, self.optimizer)))
        return losses

    def primary(self) -> dict[str, Tensor]:
        return adapters.state_dict(self.model, PRIMARY)


@dataclass(frozen=True)
class Updates:
    """The expected updates of an adapter's matrices, or of a full model's weights."""

    lr: float
    decay: float = 0.0
    ascends: bool = False


def reference_net(run: Run, primary: Updates, auxiliary: Updates | None = None) -> reference.Net:
    """Return the run's layers as a reference network, with an optimizer of the run's kind.

    The updates come from the arguments, not from the run's parameter groups, so a method that gives
    its groups a wrong rate or direction differs from the reference.

    Args:
        primary: updates of the primary, or of all weights for full fine-tuning.
        auxiliary: updates of the auxiliary, if the method has one.
    """
    primary_names = ("W0", "b") if run.method.exports_weights else ("A", "B")
    updates_of_matrix = dict.fromkeys(primary_names, primary)
    if auxiliary is not None:
        updates_of_matrix |= dict.fromkeys(("A2", "B2"), auxiliary)
    make_rule = getattr(reference, type(run.optimizer).__name__)
    layers = reference_layers(run)
    rules = []
    for _ in layers:
        layer_rules = {}
        for name, updates in updates_of_matrix.items():
            layer_rules[name] = make_rule(updates.lr, updates.decay, updates.ascends)
        rules.append(layer_rules)
    return reference.Net(layers, rules)


def reference_layers(run: Run) -> list[reference.Layer]:
    """Return the run's layers with their current values, as layers of the reference."""
    layers = []
    for index in (0, 2):
        layer = copy.deepcopy(run.model[index])
        base = getattr(layer, "base_layer", layer)
        # A, B and the scale of each adapter; full fine-tuning has none.
        values: list[Any] = []
        for name in run.method.adapters:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            values += [A.detach(), B.detach(), layer.scaling[name]]
        if not values:
            # Empty matrices add nothing.
            values = [torch.zeros(0), torch.zeros(0), 1.0]
        layers.append(reference.Layer(base.weight.detach(), base.bias.detach(), *values))
    return layers


def assert_same_layers(run: Run, net: reference.Net) -> None:
    """Check that the run's weights and adapters equal the reference's."""
    for layer, run_layer in zip(net.layers, reference_layers(run), strict=True):
        for name in ("W0", "b", "A", "B", "A2", "B2"):
            expected, value = getattr(layer, name), getattr(run_layer, name)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def assert_follows_reference(
    run: Run,
    step: Callable[[reference.Net, Tensor, Tensor], float],
    primary: Updates,
    auxiliary: Updates | None = None,
    warmup: int = 0,
) -> reference.Net:
    """Train the run and its reference, check that they stay equal, and return the reference.

    Args:
        step: function that takes one step of the reference.
        primary, auxiliary: see `reference_net`.
        warmup: number of steps in which all learning rates rise linearly from 0.
    """
    net = reference_net(run, primary, auxiliary)
    # Copies that keep the full rates; the rules themselves also hold the optimizer's moments.
    rates = copy.deepcopy(net.rules)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda k: warmup_factor(k, warmup))
    for net.k in range(STEPS):
        for layer_rules, layer_rates in zip(net.rules, rates, strict=True):
            for name, rule in layer_rules.items():
                rule.lr = layer_rates[name].lr * warmup_factor(net.k, warmup)
        expected_loss = step(net, *batch(net.k))
        (loss,) = run.train(1, first=net.k)
        assert loss == pytest.approx(expected_loss, rel=1e-10, abs=1e-10)
        schedule.step()
    assert_same_layers(run, net)
    return net


def warmup_factor(step: int, warmup: int) -> float:
    """Return the warm-up's factor on the learning rate at a step, counted from 0."""
    return min(1.0, step / warmup) if warmup else 1.0
