"""Every method equals its literal reference, step by step in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bilora_diffusion.core.seeds import seed_of
from bilora_diffusion.methods import MethodOptions, names
from tests.methods.runs import STEPS, Run, Updates, assert_follows_reference
from tests.references import methods as reference
from tests.references.methods import Net


def bar(net, x, y, kind, schedule):
    t = (net.k + 1) / STEPS
    factors = {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}
    return reference.bar(net, x, y, kind, strength=2.0 * factors[schedule])


def flat_lora(net, x, y):
    """Take a step of the reference with the noise of seed 5."""
    noise = []
    for layer, path in zip(net.layers, ("0", "2"), strict=True):
        seed = seed_of(5, "flat-lora", net.k + 1, f"model.{path}")
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(layer.W0.shape, generator=generator, dtype=torch.float64))
    rho = 0.3 * (1 - math.cos(math.pi * (net.k + 1) / STEPS)) / 2
    return reference.flat_lora(net, x, y, rho, noise)


@dataclass
class Case:
    """A method with its options, and the function that takes a step of its reference."""

    name: str
    reference: Callable[[Net, Tensor, Tensor], float]
    options: dict[str, Any] = field(default_factory=dict)


BALL: dict[str, Any] = {"auxiliary_rank": 2, "auxiliary_alpha": 3, "rho": 0.05}
in_ball = partial(reference.bilora, rho=0.05)
CASES = [
    Case("lora", reference.lora),
    Case("full", reference.full),
    Case("flat-lora", flat_lora, {"rho": 0.3, "seed": 5}),
    Case("lora-sam", partial(reference.lora_sam, rho=0.2), {"rho": 0.2}),
    Case("bilora", in_ball, {"rho": 0.05}),  # the auxiliary has the primary's rank, scale and rate
    Case("bilora", in_ball, BALL),
    Case("bilora", partial(reference.bilora, rho=0.5), BALL | {"rho": 0.5}),
    Case("bilora", partial(in_ball, scaled=False), BALL | {"rho_norm": "unscaled"}),
]
for _kind in ("oBAR", "nBAR"):
    for _schedule in ("constant", "linear", "cosine"):
        _step = partial(bar, kind=_kind, schedule=_schedule)
        _options = {"bar_alpha": 2.0, "bar_schedule": _schedule}
        CASES.append(Case(f"lora-{_kind.lower()}", _step, _options))


def combinations():
    """Yield each case with AdamW, with AdamW and a warm-up, and with SGD."""
    for case in CASES:
        yield case, "AdamW", 5e-3, 0.01, 0
        yield case, "AdamW", 5e-3, 0.01, 5
        yield case, "SGD", 0.1, 0.0, 0


@pytest.mark.parametrize(("case", "optimizer", "lr", "decay", "warmup"), combinations())
def test_50_steps_follow_the_reference(case, optimizer, lr, decay, warmup):
    """An auxiliary of its own rank also has its own scale and learning rate."""
    options = {"num_steps": STEPS, **case.options}
    auxiliary = None
    if case.name == "bilora":
        auxiliary = Updates(lr, ascends=True)
    if "auxiliary_rank" in options:
        options["auxiliary_learning_rate"] = 2 * lr
        auxiliary = Updates(2 * lr, ascends=True)
    run = Run(case.name, MethodOptions(**options), optimizer, lr, decay)
    if auxiliary is not None:
        assert run.optimizer.param_groups[1]["maximize"]
    net = assert_follows_reference(run, case.reference, Updates(lr, decay), auxiliary, warmup)
    # LoRA-SAM takes a second pass at the perturbed weights.
    assert run.passes == (2 * STEPS if case.name == "lora-sam" else STEPS)
    # Steps in which the auxiliary left the ball.
    if "outside" in net.numbers:
        assert sum(net.numbers["outside"]) >= 5, "the projection acted too rarely for this test"


def test_every_method_has_a_reference():
    assert {case.name for case in CASES} == set(names())
