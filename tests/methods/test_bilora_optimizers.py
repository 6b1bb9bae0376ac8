"""Bi-LoRA's hooks: which optimizers it takes, and which of their steps it projects after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, ball
from bilora_diffusion.methods.bilora import BiLoRA

RHO = 0.01


class Plain(torch.optim.Optimizer):
    """Gradient descent that knows no `maximize`, as Prodigy and 8-bit AdamW."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= group["lr"] * parameter.grad


def made(lr: float = 0.1) -> tuple[BiLoRA, list[dict[str, Any]], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    method = BiLoRA(MethodOptions(rho=RHO))
    spec = AdapterSpec(rank=3, target_modules=("0", "2"))
    return method, method.setup([Target("model", model, spec, lr)]), model


def backward(model: nn.Module, k: int = 0) -> Tensor:
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    loss = (model(x) - 1).square().mean()
    loss.backward()
    return loss


def states(model: nn.Module) -> list[Tensor]:
    return [
        value
        for name in (PRIMARY, AUXILIARY)
        for value in adapters.state_dict(model, name).values()
    ]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [cast(Tensor, p.grad) for p in adapters.parameters(model, AUXILIARY)]


def test_every_step_is_projected_and_logged() -> None:
    method, groups, model = made()
    assert method.metrics() == {}
    optimizer = torch.optim.AdamW(groups)
    method.bind(optimizer)
    for k in range(3):
        backward(model, k)
        optimizer.step()
        optimizer.zero_grad()
        metrics = method.metrics()
        assert list(metrics) == ["auxiliary_norm_before", "auxiliary_norm"]
        assert metrics["auxiliary_norm_before"] > RHO
        assert metrics["auxiliary_norm"] == pytest.approx(RHO, rel=1e-12)
        assert method.auxiliary_norm() == pytest.approx(RHO, rel=1e-12)


def test_a_scheduler_around_step_changes_nothing() -> None:
    method, groups, model = made()
    optimizer = torch.optim.SGD(groups)
    method.bind(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    for k in range(2):
        backward(model, k)
        optimizer.step()
        scheduler.step()
        assert method.metrics()["auxiliary_norm"] <= RHO * (1 + 1e-12)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 3] * 2)
    assert optimizer.param_groups[1]["maximize"]


def test_a_step_skipped_by_the_gradient_scaler_is_not_projected() -> None:
    method, groups, model = made()
    optimizer = torch.optim.AdamW(groups)
    method.bind(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    auxiliary = adapters.parameters(model, AUXILIARY)
    for bad in (True, False):
        with torch.no_grad():
            for parameter in auxiliary:  # outside the ball, so that a projection would show
                parameter.fill_(1.0)
        scaler.scale((model(torch.ones(7, 6).double()) - 1).square().mean()).backward()
        if bad:
            cast(Tensor, auxiliary[0].grad).fill_(float("inf"))
        before = states(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(a, b) for a, b in zip(before, states(model), strict=True))
        assert same is bad
        assert bool(method.metrics()) is not bad
    assert method.auxiliary_norm() == pytest.approx(RHO, rel=1e-12)


def test_accelerates_wrapper_is_looked_through() -> None:
    method, groups, model = made()
    raw = torch.optim.AdamW(groups)
    prepared = Accelerator(cpu=True).prepare(raw)
    method.bind(prepared)
    backward(model)
    prepared.step()
    assert method.metrics()["auxiliary_norm"] <= RHO * (1 + 1e-12)
    with pytest.raises(UserError, match="twice"):
        method.bind(raw)


def test_bind_refuses_the_same_optimizer_twice_and_moves_to_a_new_one() -> None:
    method, groups, model = made()
    first, second = torch.optim.SGD(groups), torch.optim.SGD(groups)
    method.bind(first)
    with pytest.raises(UserError, match="twice"):
        method.bind(first)
    method.bind(second)
    backward(model)
    first.step()
    assert method.metrics() == {}
    second.step()
    assert method.metrics()


def test_bind_refuses_what_it_cannot_hook() -> None:
    with pytest.raises(UserError, match="object, which is not a torch"):
        made()[0].bind(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda primary, auxiliary: [{"params": primary}], "lacks 4 parameters"),
        (
            lambda primary, auxiliary: [{"params": auxiliary, "maximize": True}],
            "lacks 4 parameters",
        ),
        (
            lambda primary, auxiliary: [{"params": primary}, {"params": auxiliary}],
            "maximize=False",
        ),
        (
            lambda primary, auxiliary: [{"params": primary + auxiliary, "maximize": True}],
            "foreign",
        ),
        (
            lambda primary, auxiliary: [
                {"params": primary},
                {"params": auxiliary, "maximize": True, "weight_decay": 0.1},
            ],
            "weight_decay=0.1",
        ),
        (
            lambda primary, auxiliary: [
                {"params": primary, "maximize": True},
                {"params": auxiliary, "maximize": True},
            ],
            "of the primary",
        ),
    ],
)
def test_bind_refuses_groups_that_would_train_otherwise(
    build: Callable[[Any, Any], list[dict[str, Any]]], word: str
) -> None:
    method, groups, _ = made()
    optimizer = torch.optim.SGD(build(groups[0]["params"], groups[1]["params"]), lr=0.1)
    with pytest.raises(UserError, match=word):
        method.bind(optimizer)


def test_an_optimizer_without_maximize_ascends_all_the_same() -> None:
    found = []
    for kind in (torch.optim.SGD, Plain):
        method, groups, model = made()
        optimizer = kind(groups)
        method.bind(optimizer)
        for k in range(4):
            backward(model, k)
            gradients = [g.clone() for g in gradients_of(model)]
            optimizer.step()
            after = gradients_of(model)
            assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
            optimizer.zero_grad()
        found.append(states(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_a_closure_is_refused_where_gradients_must_be_turned() -> None:
    method, groups, model = made()
    optimizer = Plain(groups)
    method.bind(optimizer)
    with pytest.raises(UserError, match="closure"):
        optimizer.step(lambda: float(backward(model).detach()))
    backward(model)
    optimizer.step(None)
    method, groups, model = made()
    known = torch.optim.SGD(groups)
    method.bind(known)
    known.step(lambda: float(backward(model).detach()))
    assert method.metrics()["auxiliary_norm"] > 0


def test_prodigy_ascends_on_the_auxiliary() -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    method, groups, model = made(lr=1.0)
    optimizer = prodigyopt.Prodigy(groups, d0=1e-2)
    method.bind(optimizer)
    for parameter in adapters.parameters(model, PRIMARY):
        parameter.requires_grad_(False)
    losses = []
    for _ in range(15):
        losses.append(float(backward(model).detach()))
        optimizer.step()
        optimizer.zero_grad()
        assert method.auxiliary_norm() <= RHO * (1 + 1e-12)
    assert losses[-1] > losses[0]


def test_clipping_sees_the_primary_only() -> None:
    method, groups, model = made()
    assert {id(p) for p in method.clip_parameters()} == {id(p) for p in groups[0]["params"]}
    assert {id(p) for p in groups[1]["params"]} == {
        id(p) for p in adapters.parameters(model, AUXILIARY)
    }


def test_one_ball_bounds_all_targets() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8)).double(), nn.Sequential(nn.Linear(8, 3)).double()]
    method = BiLoRA(MethodOptions(rho=RHO))
    spec = AdapterSpec(rank=2, target_modules=("0",))
    targets = [Target(str(i), model, spec, 0.1) for i, model in enumerate(models)]
    optimizer = torch.optim.AdamW(method.setup(targets))
    method.bind(optimizer)
    models[1](models[0](torch.randn(4, 6, dtype=torch.float64))).square().mean().backward()
    optimizer.step()
    norms = [float(ball.frobenius_norm(adapters.factors(m, AUXILIARY))) for m in models]
    assert min(norms) > 0
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(RHO, rel=1e-12)


def test_the_model_may_move_after_setup() -> None:
    """accelerate moves models after the optimizer is made; the hook must see the values in use."""
    method, groups, model = made()
    optimizer = torch.optim.SGD(groups)
    method.bind(optimizer)
    model._apply(lambda tensor: tensor.clone())
    backward(model)
    optimizer.step()
    assert float(ball.frobenius_norm(adapters.factors(model, AUXILIARY))) <= RHO * (1 + 1e-12)
