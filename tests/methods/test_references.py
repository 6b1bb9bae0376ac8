"""Every method against its naive reference, step by step in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bilora_diffusion.core.seeds import seed_of
from bilora_diffusion.methods import MethodOptions, names
from bilora_diffusion.methods.bilora import radius
from bilora_diffusion.methods.options import L2SPOptions
from tests.methods.runs import SPEC, STEPS, Run, follow
from tests.references import methods as reference
from tests.references.methods import Net

FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


def bar(net, x, y, kind, schedule):
    strength = 2.0 * FALLS[schedule]((net.k + 1) / STEPS)
    return reference.bar(net, x, y, kind, strength)


def flat_lora(net, x, y):
    """With the noise of seed 5."""
    normal = []
    for layer, path in zip(net.layers, ("0", "2"), strict=True):
        seed = seed_of(5, "flat-lora", net.k + 1, f"model.{path}")
        generator = torch.Generator().manual_seed(seed)
        normal.append(torch.randn(layer.W0.shape, generator=generator, dtype=torch.float64))
    rho = 0.3 * (1 - math.cos(math.pi * (net.k + 1) / STEPS)) / 2
    return reference.flat_lora(net, x, y, rho, normal)


Case = tuple[str, dict[str, Any], Callable[[Net, Tensor, Tensor], float]]
BALL: dict[str, Any] = {"auxiliary_rank": 2, "auxiliary_alpha": 3, "rho": 0.05}
CASES: list[Case] = [
    ("lora", {}, reference.lora),
    ("full", {}, reference.full),
    ("flat-lora", {"rho": 0.3, "seed": 5}, flat_lora),
    ("lora-sam", {"rho": 0.2}, partial(reference.lora_sam, rho=0.2)),
    *(
        (
            "lora-l2sp",
            {"settings": L2SPOptions(l2sp_lambda=0.3), "init": init},
            partial(reference.lora_l2sp, strength=0.3),
        )
        for init in ("default", "pissa")
    ),
    *(
        (
            f"lora-{kind.lower()}",
            {"bar_alpha": 2.0, "bar_schedule": schedule},
            partial(bar, kind=kind, schedule=schedule),
        )
        for kind in ("oBAR", "nBAR")
        for schedule in FALLS
    ),
    ("bilora", BALL, partial(reference.bilora, rho=0.05)),
    ("bilora", BALL | {"rho": 0.5}, partial(reference.bilora, rho=0.5)),
    *(
        ("bilora", BALL | {"ball": ball}, partial(reference.bilora, rho=0.05, ball=ball))
        for ball in ("per-layer", "none")
    ),
    ("bilora", BALL | {"auxiliary_direction": "descent"}, partial(reference.bilora, rho=0.05)),
    ("bilora", BALL | {"rho_norm": "unscaled"}, partial(reference.bilora, rho=0.05, scaled=False)),
    *(
        (
            "bilora",
            {"rho": "auto", "loss_rise": 0.3, "rho_norm": norm},
            partial(
                reference.auto_radius,
                tau=0.3,
                largest_share=radius.LARGEST_SHARE,
                scaled=norm == "scaled",
            ),
        )
        for norm in ("scaled", "unscaled")
    ),
]
PASSES = {"lora-sam": 2 * STEPS}
OPTIMIZERS = {"SGD": ("SGD", 0.1, 0.0), "AdamW": ("AdamW", 5e-3, 0.01)}


def combinations():
    """Every case with both optimizers, and with a warm-up of AdamW's rate."""
    for case in CASES:
        yield (case, OPTIMIZERS["AdamW"], 0)
        yield (case, OPTIMIZERS["AdamW"], 5)
        # Without a ball gradient ascent diverges.
        if case[1].get("ball") != "none":
            yield (case, OPTIMIZERS["SGD"], 0)


@pytest.mark.parametrize(("case", "optimizer", "warmup"), combinations())
def test_50_steps_follow_the_naive_reference(case, optimizer, warmup):
    """Acceptance: float64; an auxiliary has another rank, scale and learning rate."""
    (name, options, step), (kind, lr, decay) = case, optimizer
    method_options = {"num_steps": STEPS, **options}
    spec = replace(SPEC, init=method_options.pop("init", "default"))
    if method_options.get("auxiliary_rank"):
        method_options["auxiliary_learning_rate"] = 2 * lr
    run = Run(name, MethodOptions(**method_options), kind, lr, decay, spec)
    net = follow(run, step, warmup)
    assert run.passes == PASSES.get(name, STEPS)
    assert sum(net.numbers.get("outside", [5])) >= 5, "the ball must have been at work"


def test_every_method_has_a_reference():
    assert {name for name, *_ in CASES} == set(names())
