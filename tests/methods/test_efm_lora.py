"""EFMLoRA against its naive reference in float64, with every matrix of the weight's size formed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import pinv

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, Factors
from bilora_diffusion.methods import EFMLoRAOptions, MethodOptions
from bilora_diffusion.methods.efm_lora import perturbations
from tests.methods.runs import batch
from tests.methods.test_baselines import STEPS, Run, each_optimizer, follow, rules
from tests.references import baselines as reference


def equations_12_to_15(
    A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, s: float, rho: float
) -> Tensor:
    """E^B of one layer."""
    gradient = 0.5 * (g_B @ pinv(A.T) / s + pinv(B.T) @ g_A / s)
    whole = rho * gradient / torch.sqrt((gradient**2).sum())
    return whole @ pinv(A) / s


class EFM:
    """Algorithm 2."""

    def __init__(self, rho: float, beta: float, schedule: str) -> None:
        self.rho, self.beta, self.schedule = rho, beta, schedule
        self.E: list[Tensor] = []

    def step(self, layers: Any, rules: Any, x: Tensor, y: Tensor, t: int) -> float:
        rho = self.rho / math.sqrt(t) if self.schedule == "sqrt" else self.rho
        E = self.E or [torch.zeros_like(la.B) for la in layers]
        moved = [
            reference.Layer(la.W0, la.b, la.A, la.B + e, la.s)
            for la, e in zip(layers, E, strict=True)
        ]
        loss, gradients = reference.factor_gradients(moved, x, y)
        new = [
            equations_12_to_15(la.A, la.B, g["A"], g["B"], la.s, rho)
            for la, g in zip(moved, gradients, strict=True)
        ]
        if t == 1:
            self.E = new
        else:
            self.E = [(1 - self.beta) * e + self.beta * n for e, n in zip(E, new, strict=True)]
        reference.descend(layers, rules, gradients)
        return loss


@pytest.mark.parametrize("schedule", ["constant", "sqrt"])
@each_optimizer
def test_it_follows_the_reference_in_one_pass(
    kind: str, lr: float, decay: float, schedule: str
) -> None:
    options = EFMLoRAOptions(efm_beta=0.6, efm_schedule=schedule)
    run = Run("efm-lora", MethodOptions(rho=0.2, own=options), kind, lr, decay)
    naive, rule = EFM(0.2, 0.6, schedule), rules(kind, lr, decay)
    follow(run, lambda layers, k: naive.step(layers, rule, *batch(k), t=k + 1))
    assert run.passes == STEPS
    own = adapters.factors(run.model, PRIMARY)
    moves = [float((f.scale * e @ f.A).norm()) for f, e in zip(own, naive.E, strict=True)]
    assert run.method.metrics() == pytest.approx({"perturbation_norm": math.hypot(*moves)})


def factors(r: int, n: int, m: int, s: float) -> Factors:
    return Factors("layer", torch.randn(r, n).double(), torch.randn(m, r).double(), s)


def test_layers_of_any_shape_and_none_without_a_gradient() -> None:
    torch.manual_seed(0)
    shapes = [(3, 7, 5, 2.0), (3, 7, 5, 2.0), (2, 4, 9, 0.5), (4, 3, 3, 1.0), (3, 7, 5, 2.0)]
    own, gradients = ([factors(*shape) for shape in shapes] for _ in range(2))
    own[1].B.zero_()  # as at the start of a run
    given: list[Factors | None] = [*gradients[:-1], None]
    *found, missing = perturbations(own, given, 0.3)
    assert missing is None
    for f, g, E in zip(own, gradients, found, strict=False):
        expected = equations_12_to_15(f.A, f.B, g.A, g.B, f.scale, 0.3)
        torch.testing.assert_close(E, expected, rtol=1e-8, atol=1e-10)


def test_a_zero_gradient_moves_nothing() -> None:
    torch.manual_seed(0)
    own, zero = factors(3, 7, 5, 2.0), factors(3, 7, 5, 2.0)
    zero.A.zero_()
    zero.B.zero_()
    (E,) = perturbations([own], [zero], 0.3)
    assert E is not None
    assert not E.any()
