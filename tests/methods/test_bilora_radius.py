"""The radius that sets itself: against a naive reference, what it does not depend on, resumes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import Method, MethodOptions, Target, create, radius
from tests.methods.runs import batch, two_layers
from tests.methods.test_bilora import naive_copy
from tests.references import bilora as reference

STEPS = 50
TAU = 0.3


def started(
    model: nn.Module, lr: float = 5e-3, init: str = "default", **options: Any
) -> tuple[Method, list[dict[str, Any]]]:
    method = create("bilora", MethodOptions(**{"rho": "auto", "loss_rise": TAU, **options}))
    torch.manual_seed(1)
    spec = AdapterSpec(rank=3, alpha=6, init=init, target_modules=("0", "2"))
    return method, method.setup([Target("model", model, spec, lr)])


def steps(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    which: range,
    unit: float = 1,
) -> list[dict[str, float]]:
    """Train on `batch(k)`, the loss in another unit; returns loss and metrics of each step."""
    rows = []
    for k in which:
        x, y = batch(k)

        def forward_backward(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = unit * (model(x) - y).square().mean()
            loss.backward()
            return loss.detach()

        loss = method.step(forward_backward, optimizer)
        rows.append({"loss": float(loss), **method.metrics()})
    return rows


@pytest.mark.parametrize("rho_norm", ["scaled", "unscaled"])
def test_50_steps_follow_the_naive_reference(rho_norm: str) -> None:
    model = two_layers()
    method, groups = started(model, rho_norm=rho_norm)
    layers = naive_copy(model)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    method.bind(optimizer)
    rules: list[dict[str, reference.SGD | reference.AdamW]] = [
        {n: reference.AdamW(5e-3, 0.0, n.endswith("2")) for n in ("B1", "A1", "B2", "A2")}
        for _ in layers
    ]
    naive = reference.AutoRadius(layers, TAU, rho_norm, radius.MOST)
    expected = [naive.step(rules, *batch(k)) for k in range(STEPS)]
    found = steps(method, model, optimizer, range(STEPS))
    assert sum(row["rho"] < row["norm_before"] for row in expected) > 5, "it must have clipped"
    for row, own in zip(expected, found, strict=True):
        assert own["loss"] == pytest.approx(row["loss"], rel=1e-10)
        assert own["rho"] == pytest.approx(row["rho"], rel=1e-10)
        assert own["auxiliary_norm_before"] == pytest.approx(row["norm_before"], rel=1e-10)
    for name, letters in ((PRIMARY, ("A1", "B1")), (AUXILIARY, ("A2", "B2"))):
        for factor, layer in zip(adapters.factors(model, name), layers, strict=True):
            for tensor, letter in zip((factor.A, factor.B), letters, strict=True):
                torch.testing.assert_close(tensor, getattr(layer, letter), rtol=1e-10, atol=1e-10)


def test_the_unit_of_the_loss_plays_no_part() -> None:
    courses = []
    for unit in (1.0, 10.0):
        model = two_layers()
        method, groups = started(model)
        optimizer = torch.optim.AdamW(groups, eps=1e-8 * unit)
        method.bind(optimizer)
        courses.append(steps(method, model, optimizer, range(20), unit))
    for one, ten in zip(*courses, strict=True):
        assert ten["loss"] == pytest.approx(10 * one["loss"], rel=1e-6)
        assert ten["rho"] == pytest.approx(one["rho"], rel=1e-6)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_radius_never_passes_a_share_of_the_primarys_change(init: str) -> None:
    """However little the loss moves in comparison to what is asked for."""
    model: Any = two_layers()
    weights = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    method, groups = started(model, loss_rise=10.0, init=init)
    optimizer = torch.optim.AdamW(groups)
    method.bind(optimizer)
    for k in range(STEPS):
        (row,) = steps(method, model, optimizer, range(k, k + 1))
        with method.evaluating():
            now = [effective(layer) for _, layer in adapters.layers(model)]
        moved = math.hypot(*(float((a - b).norm()) for a, b in zip(now, weights, strict=True)))
        assert row["rho"] <= radius.MOST * moved * (1 + 1e-9)
    assert row["rho"] == pytest.approx(radius.MOST * moved)


def effective(layer: Any) -> Tensor:
    """The weight that acts where the primary alone does."""
    inputs = torch.eye(layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        return (layer(inputs) - layer(torch.zeros_like(inputs))).T


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ball_shrinks_where_the_loss_moves_too_much_either_way(sign: int) -> None:
    """A negative slope is that of a primary which leans on the auxiliary."""
    auto = radius.AutoRadius(0.1)
    norm = torch.tensor(2.0, dtype=torch.float64)
    for _ in range(30):
        auto.projected(norm)
        gamma = sign * 0.5 * norm  # half of the loss at a radius of 1
        norm = auto.update(torch.ones_like(norm), gamma, moved=100 * norm)
    assert float(norm) == pytest.approx(0.2, rel=1e-2)


def test_a_loop_of_ones_own_tells_the_loss() -> None:
    model = two_layers()
    bilora = attach(model, BiLoRAConfig(rank=3, rho="auto", target_modules=("0", "2")))
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=5e-3))
    bilora.bind(optimizer)
    x, y = batch(0)
    for _ in range(3):
        loss = (model(x) - y).square().mean()
        loss.backward()
        bilora.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert bilora.auxiliary_norm() > 0
    (model(x) - y).square().mean().backward()
    with pytest.raises(UserError, match=r"observe\(loss\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["lora-sam", "flat-lora"])
def test_a_method_whose_radius_can_not_set_itself_refuses(name: str) -> None:
    with pytest.raises(UserError, match=f"auto.*{name}"):
        create(name, MethodOptions(rho="auto"))
