"""Bi-LoRA: its ball after every step, and the optimizers that it accepts."""

import copy
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, create
from bilora_diffusion.methods.bilora import ball
from tests.methods.runs import Run

RHO = 0.01
ALPHAS = st.sampled_from([0.5, 2.0, 32.0])


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    alphas=st.tuples(ALPHAS, ALPHAS),
    rho=st.floats(1e-3, 10),
    rho_norm=st.sampled_from(["scaled", "unscaled"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    kind=st.sampled_from(["SGD", "AdamW", "Adafactor"]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_the_norm_is_measured_and_within_rho_after_every_step(
    sizes, ranks, alphas, rho, rho_norm, dtype, kind, layout
):
    """The expected norm is that of the weight changes in float64, including a Conv2d."""
    inputs, channels, outputs = sizes
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1),
        nn.Flatten(2),
        nn.Linear(4, outputs),
        nn.Linear(outputs, outputs),
    ).to(dtype)
    model = model.to(memory_format=layout)
    options = MethodOptions(
        rho,
        rho_norm,
        auxiliary_rank=ranks[1],
        auxiliary_alpha=alphas[1],
        auxiliary_learning_rate=0.3,
    )
    method: Any = create("bilora", options)
    spec = AdapterSpec(rank=ranks[0], alpha=alphas[0], target_modules=("0", "2", "3"))
    # The primary's rate is low, so that no run diverges.
    optimizer = getattr(torch.optim, kind)(method.setup([Target("model", model, spec, lr=1e-4)]))
    method.bind(optimizer)
    for k in range(6):
        x = torch.randn(2, inputs, 2, 2, generator=torch.Generator().manual_seed(k)).to(dtype)
        model(x).float().sin().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        norms = []
        for _, layer in adapters.layers(model, AUXILIARY):
            norms.append(float(change(layer, rho_norm == "scaled").norm()))
        norm = math.hypot(*norms)
        assert norm <= rho * (1 + 1e-6)
        assert method.auxiliary_norm() == pytest.approx(norm, rel=1e-5, abs=1e-9)


def change(layer, scaled):
    """Return the auxiliary's change of a linear or convolution layer's weight, in float64."""
    A = layer.lora_A[AUXILIARY].weight.detach().double().flatten(1)  # (rank, in * kernel)
    B = layer.lora_B[AUXILIARY].weight.detach().double().flatten(1)  # (out, rank)
    return (layer.scaling[AUXILIARY] if scaled else 1.0) * B @ A


class Plain(torch.optim.Optimizer):
    """Gradient descent without `maximize`, like Prodigy and 8-bit AdamW."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure=None):  # type: ignore[override]
        if closure is not None:
            closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= group["lr"] * parameter.grad


def bilora_run(kind: Any = "SGD", bound=True) -> Any:
    return Run("bilora", MethodOptions(rho=RHO), kind, 0.1, bound=bound)


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_step_is_projected_and_logged_with_a_schedule_and_accelerate(wrapped):
    run = bilora_run("AdamW", bound=False)
    assert run.method.metrics() == {}
    optimizer = Accelerator(cpu=True).prepare(run.optimizer) if wrapped else run.optimizer
    run.method.bind(optimizer)
    run.model._apply(torch.clone)  # as when accelerate moves a model after `setup`
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda k: 1 / (k + 1))
    for k in range(3):
        run.backward(k)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        metrics = run.method.metrics()
        assert list(metrics) == ["auxiliary_norm_before", "auxiliary_norm"]
        # Otherwise there would be nothing to project.
        assert metrics["auxiliary_norm_before"] > RHO
        factors = adapters.factors(run.model, AUXILIARY)
        assert float(ball.frobenius_norm(factors)) == pytest.approx(RHO, rel=1e-12)
        assert metrics["auxiliary_norm"] == pytest.approx(RHO, rel=1e-12)
        assert run.method.auxiliary_norm() == pytest.approx(RHO, rel=1e-12)
    groups = run.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 4] * 2)
    assert groups[1]["maximize"]
    with pytest.raises(UserError, match="twice"):
        run.method.bind(run.optimizer)


def test_bind_moves_to_a_new_optimizer_and_refuses_objects_without_hooks():
    run = bilora_run()
    second = torch.optim.SGD(run.groups)
    run.method.bind(second)
    run.backward()
    run.optimizer.step()
    assert run.method.metrics() == {}
    second.step()
    assert run.method.metrics()
    with pytest.raises(UserError, match="object"):
        run.method.bind(object())


def test_bind_refuses_groups_that_would_train_differently():
    run = bilora_run(bound=False)
    primary, auxiliary = [group["params"] for group in run.groups]
    descending = {"params": auxiliary}
    ascending = {"params": auxiliary, "maximize": True}
    for groups, words in (
        ([{"params": primary}], "lacks 4"),
        ([ascending], "lacks 4"),
        ([{"params": primary}, descending], "maximize=False"),
        ([{"params": primary + auxiliary, "maximize": True}], "other parameters"),
        ([{"params": primary}, {**ascending, "weight_decay": 0.1}], "decay=0.1"),
        ([{"params": primary, "maximize": True}, ascending], "the primary's"),
    ):
        with pytest.raises(UserError, match=words):
            run.method.bind(torch.optim.SGD(groups, lr=0.1))


def test_an_optimizer_without_maximize_can_still_ascend():
    sgd_run, plain_run = bilora_run(torch.optim.SGD), bilora_run(Plain)
    for run in (sgd_run, plain_run):
        for k in range(4):
            run.backward(k)
            auxiliary = adapters.parameters(run.model, AUXILIARY)
            gradients = [copy.deepcopy(parameter.grad) for parameter in auxiliary]
            run.optimizer.step()
            # A gradient that was negated for the step has its old sign again.
            for parameter, gradient in zip(auxiliary, gradients, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
            run.optimizer.zero_grad()
    for name in (PRIMARY, AUXILIARY):
        state = adapters.state_dict(plain_run.model, name)
        expected = adapters.state_dict(sgd_run.model, name)
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=0)


def test_a_closure_is_refused_if_gradients_must_be_negated():
    run = bilora_run(Plain)
    with pytest.raises(UserError, match="closure"):
        run.optimizer.step(run.backward)
    run.backward()
    run.optimizer.step(None)
    sgd_run = bilora_run()
    sgd_run.optimizer.step(sgd_run.backward)
    assert sgd_run.method.metrics()["auxiliary_norm"] > 0
