"""LoRA-MSAM against its naive reference in float64, and whose momentum it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import Tensor

from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, create
from tests.methods.runs import batch, two_layers
from tests.methods.test_baselines import SPEC, STEPS, Run, follow, rules
from tests.references import baselines as reference


def msam(layers: list[reference.Layer], rules: Any, x: Tensor, y: Tensor, rho: float) -> float:
    """Algorithm 1 on AdamW: the gradient at w - rho m / ||m||, the step from w."""
    norm = math.sqrt(sum(float((rule.m**2).sum()) for own in rules for rule in own.values()))
    share = rho / norm if norm else 0.0
    ahead = [
        reference.Layer(la.W0, la.b, la.A - share * r["A"].m, la.B - share * r["B"].m, la.s)
        for la, r in zip(layers, rules, strict=True)
    ]
    loss, gradients = reference.factor_gradients(ahead, x, y)
    reference.descend(layers, rules, gradients)
    return loss


def test_it_follows_the_reference_in_one_pass() -> None:
    run = Run("lora-msam", MethodOptions(rho=0.2), "AdamW", 5e-3, 0.01)
    rule = rules("AdamW", 5e-3, 0.01)
    follow(run, lambda layers, k: msam(layers, rule, *batch(k), rho=0.2))
    assert run.passes == STEPS


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "exp_avg": torch.optim.AdamW,
    "momentum_buffer": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "prodigy": lambda groups: Prodigy([{**group, "lr": 1.0} for group in groups]),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_weights_are_moved_by_rho_against_the_momentum_and_put_back(kind: str) -> None:
    model, method = two_layers(), create("lora-msam", MethodOptions(rho=0.3))
    optimizer = OPTIMIZERS[kind](method.setup([Target("model", model, SPEC, 1e-2)]))
    method.bind(optimizer)
    weights, name = method.clip_parameters(), kind if kind != "prodigy" else "exp_avg"
    for k in range(3):
        before = [weight.detach().clone() for weight in weights]
        momenta = [optimizer.state[weight].get(name) for weight in weights]

        def forward_backward(k: int = k, before: Any = before, momenta: Any = momenta) -> Tensor:
            steps = [w.detach() - b for w, b in zip(weights, before, strict=True)]
            if k == 0:
                assert not any(step.any() for step in steps)
            else:
                norm = torch.cat([v.flatten() for v in momenta]).norm()
                for step, v in zip(steps, momenta, strict=True):
                    torch.testing.assert_close(step, -0.3 * v / norm)
            loss = (model(batch(k)[0]) - batch(k)[1]).square().mean()
            loss.backward()
            with torch.no_grad():
                for weight in weights:  # only what moved them is left to see below
                    weight.grad = torch.zeros_like(weight) if k == 2 else weight.grad
            return loss.detach()

        stepped: list[bool] = []

        class Watching:
            def step(self, before: Any = before, stepped: list[bool] = stepped) -> None:
                stepped.append(all(torch.equal(w, b) for w, b in zip(weights, before, strict=True)))
                optimizer.step()

            def zero_grad(self) -> None:
                optimizer.zero_grad()

        method.step(forward_backward, Watching())
        assert stepped == [True]


def test_an_optimizer_without_momentum_is_refused() -> None:
    model, method = two_layers(), create("lora-msam")
    groups = method.setup([Target("model", model, SPEC, 1e-2)])
    with pytest.raises(UserError, match=r"SGD as it is set keeps none.*momentum=0\.9"):
        method.bind(torch.optim.SGD(groups, lr=0.1))
    optimizer = torch.optim.AdamW(groups)
    method.bind(optimizer)
    optimizer.state[method.clip_parameters()[0]] = {"state1": torch.zeros(3)}  # codes of 8 bits
    with pytest.raises(UserError, match="none that can be read, only state1; use AdamW"):
        method.step(lambda: torch.zeros(()), optimizer)
