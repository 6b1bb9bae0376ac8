"""Promises of every optimizer that `--optimizer` accepts, with methods that use it differently."""

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
"""Width of the layers, large enough for bitsandbytes to store 8-bit states of rank-4 factors."""


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    inputs = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    case = Case(wide, ("0", "2"), lambda model, rows: cast(Tensor, model(inputs[rows])))
    monkeypatch.setitem(CASES, "wide", case)


def make_run(name, method):
    """Return a run of the method on a wide model, with the optimizer of a command line."""
    cfg = resolve(f"--dataset mini --optimizer {name} --method {method}".split())
    rho = 0.05
    lr = 1e-2
    if name == "prodigy":  # it estimates its own rate and starts with very small steps
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
def test_every_optimizer_reduces_the_loss_and_resumes_exactly(name, method):
    uninterrupted = make_run(name, method)
    losses = uninterrupted.train(12)
    assert losses[-1] < losses[0]
    first = make_run(name, method)
    first.train(5)
    saved = first.checkpoint()
    state, tensors = split(saved["optimizer"])  # as in a checkpoint
    saved["optimizer"] = join(json.loads(json.dumps(state)), tensors)
    assert ("8bit" in name) == any(t.dtype == torch.uint8 for t in tensors.values())
    resumed = make_run(name, method).resume(saved)
    assert resumed.train(7) == losses[5:]
    for key, value in resumed.tensors().items():
        assert torch.equal(value, uninterrupted.tensors()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_auxiliary_ascends_within_its_ball(name):
    run = make_run(name, "bilora")
    # With the primary frozen, only the auxiliary changes the loss, by ascent.
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
    assert max(norms_before) > rho, "the auxiliary never left the ball, so nothing was projected"
    assert losses[-1] > losses[0]
