"""LoRA-LookSAM against its naive reference in float64, and what its k means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.methods import LookSAMOptions, MethodOptions
from tests.methods.runs import batch
from tests.methods.test_baselines import STEPS, Run, each_optimizer, follow, rules
from tests.references import baselines as reference

Gradients = list[dict[str, Tensor]]


def inner(one: Gradients, other: Gradients) -> float:
    pairs = zip(one, other, strict=True)
    return sum(float((a[side] * b[side]).sum()) for a, b in pairs for side in "AB")


def plus(one: Gradients, factor: float, other: Gradients) -> Gradients:
    pairs = zip(one, other, strict=True)
    return [{side: a[side] + factor * b[side] for side in "AB"} for a, b in pairs]


class LookSAM:
    """Algorithm 1, with theta the angle between g and g_s."""

    def __init__(self, rho: float, k: int, alpha: float) -> None:
        self.rho, self.k, self.alpha = rho, k, alpha
        self.g_v: Gradients = []

    def step(self, layers: Any, rules: Any, x: Tensor, y: Tensor, t: int) -> float:
        loss, g = reference.factor_gradients(layers, x, y)
        length = math.sqrt(inner(g, g))
        if t % self.k == 0:
            uphill = [
                reference.Layer(
                    la.W0,
                    la.b,
                    la.A + self.rho * own["A"] / length,
                    la.B + self.rho * own["B"] / length,
                    la.s,
                )
                for la, own in zip(layers, g, strict=True)
            ]
            _, g_s = reference.factor_gradients(uphill, x, y)
            cos = inner(g, g_s) / (length * math.sqrt(inner(g_s, g_s)))
            self.g_v = plus(g_s, -math.sqrt(inner(g_s, g_s)) * cos / length, g)
        else:
            g_s = plus(g, self.alpha * length / math.sqrt(inner(self.g_v, self.g_v)), self.g_v)
        reference.descend(layers, rules, g_s)
        return loss


def options(**own: Any) -> MethodOptions:
    return MethodOptions(rho=0.2, own=LookSAMOptions(**own))


@each_optimizer
def test_it_follows_the_reference(kind: str, lr: float, decay: float) -> None:
    run = Run("lora-looksam", options(looksam_k=3, looksam_alpha=0.5), kind, lr, decay)
    naive, rule = LookSAM(0.2, 3, 0.5), rules(kind, lr, decay)
    follow(run, lambda layers, k: naive.step(layers, rule, *batch(k), t=k))
    assert run.passes == STEPS + math.ceil(STEPS / 3)


def test_looking_at_every_step_is_lora_sam() -> None:
    sam = Run("lora-sam", MethodOptions(rho=0.2), "AdamW", 5e-3)
    look = Run("lora-looksam", options(looksam_k=1), "AdamW", 5e-3)
    torch.testing.assert_close(look.train(), sam.train(), rtol=1e-10, atol=1e-10)


def test_the_rise_is_logged_where_it_was_measured() -> None:
    run = Run("lora-looksam", options(looksam_k=2), "SGD", 0.05)
    seen = []
    for k in range(4):
        run.train(1, first=k)
        seen.append(run.method.metrics())
    assert [list(metrics) for metrics in seen] == [["sharpness"], [], ["sharpness"], []]
    assert all(value > 0 for metrics in seen for value in metrics.values())
