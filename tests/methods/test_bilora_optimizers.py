"""Bi-LoRA's hooks: which optimizers it takes, and which of their steps it projects after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import MethodOptions, ball
from tests.methods.runs import Run

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


def made(kind: Any = "SGD", lr: float = 0.1, bound: bool = True) -> Any:
    return Run("bilora", MethodOptions(rho=RHO), kind, lr, bound=bound)


def states(model: nn.Module) -> list[Tensor]:
    return [
        value
        for name in (PRIMARY, AUXILIARY)
        for value in adapters.state_dict(model, name).values()
    ]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [cast(Tensor, p.grad) for p in adapters.parameters(model, AUXILIARY)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_step_is_projected_and_logged_under_a_schedule_and_accelerate(wrapped: bool) -> None:
    run = made("AdamW", bound=False)
    assert run.method.metrics() == {}
    optimizer = Accelerator(cpu=True).prepare(run.optimizer) if wrapped else run.optimizer
    run.method.bind(optimizer)
    run.model._apply(lambda tensor: tensor.clone())  # as accelerate moves models, after `setup`
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda k: 1 / (k + 1))
    for k in range(3):
        run.backward(k)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        metrics = run.method.metrics()
        assert list(metrics) == ["auxiliary_norm_before", "auxiliary_norm"]
        assert metrics["auxiliary_norm_before"] > RHO
        assert metrics["auxiliary_norm"] == pytest.approx(RHO, rel=1e-12)
        assert run.method.auxiliary_norm() == pytest.approx(RHO, rel=1e-12)
        norm = ball.frobenius_norm(adapters.factors(run.model, AUXILIARY))
        assert float(norm) == pytest.approx(RHO, rel=1e-12)
    groups = run.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 4] * 2)
    assert groups[1]["maximize"]
    with pytest.raises(UserError, match="twice"):
        run.method.bind(run.optimizer)


def test_bind_moves_to_a_new_optimizer_and_refuses_what_it_cannot_hook() -> None:
    run = made()
    second = torch.optim.SGD(run.groups)
    run.method.bind(second)
    run.backward()
    run.optimizer.step()
    assert run.method.metrics() == {}
    second.step()
    assert run.method.metrics()
    with pytest.raises(UserError, match="object"):
        run.method.bind(object())


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda p, a: [{"params": p}], "lacks 4"),
        (lambda p, a: [{"params": a, "maximize": True}], "lacks 4"),
        (lambda p, a: [{"params": p}, {"params": a}], "maximize=False"),
        (lambda p, a: [{"params": p + a, "maximize": True}], "foreign"),
        (
            lambda p, a: [{"params": p}, {"params": a, "maximize": True, "weight_decay": 0.1}],
            "weight_decay=0.1",
        ),
        (
            lambda p, a: [{"params": p, "maximize": True}, {"params": a, "maximize": True}],
            "of the primary",
        ),
    ],
)
def test_bind_refuses_groups_that_would_train_otherwise(
    build: Callable[[Any, Any], list[dict[str, Any]]], word: str
) -> None:
    run = made(bound=False)
    optimizer = torch.optim.SGD(build(*(group["params"] for group in run.groups)), lr=0.1)
    with pytest.raises(UserError, match=word):
        run.method.bind(optimizer)


def test_an_optimizer_without_maximize_ascends_all_the_same() -> None:
    reached = []
    for kind in (torch.optim.SGD, Plain):
        run = made(kind)
        for k in range(4):
            run.backward(k)
            gradients = [g.clone() for g in gradients_of(run.model)]
            run.optimizer.step()
            after = gradients_of(run.model)
            assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
            run.optimizer.zero_grad()
        reached.append(states(run.model))
    for a, b in zip(*reached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_closure_is_refused_where_gradients_must_be_turned() -> None:
    run = made(Plain)
    with pytest.raises(UserError, match="closure"):
        run.optimizer.step(lambda: float(run.backward()))
    run.backward()
    run.optimizer.step(None)
    known = made()
    known.optimizer.step(lambda: float(known.backward()))
    assert known.method.metrics()["auxiliary_norm"] > 0
