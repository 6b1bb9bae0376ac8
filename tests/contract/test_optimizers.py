"""Promises of every optimizer that can be named, under methods that use it differently."""

import json
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.core.values import OPTIMIZERS
from bilora_diffusion.image.config import resolve
from bilora_diffusion.run.checkpoint import join, split
from bilora_diffusion.train.optimizers import build_optimizer
from tests.contract.harness import Run
from tests.contract.models import CASES, Case

WIDTH = 1100
"""Factors of rank 4 are then large enough for bitsandbytes to keep their state in 8 bits."""


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    inputs = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    case = Case(wide, ("0", "2"), lambda model, rows: cast(Tensor, model(inputs[rows])))
    monkeypatch.setitem(CASES, "wide", case)


def make_run(name, method):
    """The method on a wide model with the optimizer that a command line names."""
    cfg = resolve(f"--dataset mini --optimizer {name} --method {method}".split())
    rho = 0.05
    lr = 1e-2
    if name == "prodigy":  # it finds its rate itself, from very small steps on
        rho = 1e-4
        lr = 1.0
    return Run(
        method,
        "default",
        "wide",
        options={"rho": rho},
        lr=lr,
        optimizer=partial(build_optimizer, cfg),
    )


@pytest.mark.parametrize("method", ["lora", "bilora", "lora-sam"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_descends_and_resumes_bit_exact(name, method):
    uninterrupted = make_run(name, method)
    losses = uninterrupted.train(12)
    assert losses[-1] < losses[0]
    first = make_run(name, method)
    first.train(5)
    saved = first.checkpoint()
    state, tensors = split(saved["optimizer"])  # as a checkpoint holds it
    saved["optimizer"] = join(json.loads(json.dumps(state)), tensors)
    assert ("8bit" in name) == any(t.dtype == torch.uint8 for t in tensors.values())
    resumed = make_run(name, method).resume(saved)
    assert resumed.train(7) == losses[5:]
    for key, value in resumed.tensors().items():
        assert torch.equal(value, uninterrupted.tensors()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_auxiliary_climbs_within_its_ball(name):
    run = make_run(name, "bilora")
    # With the primary frozen the loss only follows the auxiliary, which ascends.
    for parameter in adapters.parameters(run.model, PRIMARY):
        parameter.requires_grad_(False)
    rho = run.method.rho
    losses = []
    norms_before = []
    for _ in range(15):
        losses += run.train(1)
        metrics = run.method.metrics()
        norms_before.append(metrics["auxiliary_norm_before"])
        assert metrics["auxiliary_norm"] <= rho * (1 + 1e-6)
    assert max(norms_before) > rho, "the ball must have been at work"
    assert losses[-1] > losses[0]
