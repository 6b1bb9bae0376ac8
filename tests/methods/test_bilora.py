"""Bi-LoRA: its ball after every step, the radius that sets itself, and its optimizers."""

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import MethodOptions, Target, create
from bilora_diffusion.methods.bilora import ball, radius
from tests.methods.runs import SPEC, STEPS, Run, batch, two_layers

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
    """Acceptance: the norm of the weights' changes themselves, in float64; Conv2d among them."""
    n, h, m = sizes
    torch.manual_seed(0)
    layers = (nn.Conv2d(n, h, 3, padding=1), nn.Flatten(2), nn.Linear(4, m), nn.Linear(m, m))
    model: Any = nn.Sequential(*layers).to(dtype)
    model = model.to(memory_format=layout)
    auxiliary_options: dict[str, Any] = {"auxiliary_rank": ranks[1], "auxiliary_alpha": alphas[1]}
    auxiliary_options["auxiliary_learning_rate"] = 0.3  # slow for the primary, that no run diverges
    method: Any = create("bilora", MethodOptions(rho, rho_norm, **auxiliary_options))
    spec = AdapterSpec(rank=ranks[0], alpha=alphas[0], target_modules=("0", "2", "3"))
    optimizer = getattr(torch.optim, kind)(method.setup([Target("model", model, spec, 1e-4)]))
    method.bind(optimizer)
    for k in range(6):
        x = torch.randn(2, n, 2, 2, generator=torch.Generator().manual_seed(k)).to(dtype)
        model(x).float().sin().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        auxiliary_layers = adapters.layers(model, AUXILIARY)
        changes = [change(layer, rho_norm == "scaled") for _, layer in auxiliary_layers]
        norm = math.hypot(*(float(value.norm()) for value in changes))
        assert norm <= rho * (1 + 1e-6)
        assert method.auxiliary_norm() == pytest.approx(norm, rel=1e-5, abs=1e-9)


def change(layer, scaled):
    """The auxiliary's change of a linear or convolution layer's weight, formed in float64."""
    A, B = (f[AUXILIARY].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
    scale = layer.scaling[AUXILIARY] if scaled else 1.0
    return scale * torch.einsum("mr,rnk->mnk", B.flatten(1), A.reshape(*A.shape[:2], -1))


def test_the_unit_of_the_loss_plays_no_part_in_the_radius():
    curves = []
    for unit in (1.0, 10.0):
        options = MethodOptions(rho="auto", loss_rise=0.3)
        run = Run("bilora", options, lambda g, unit=unit: torch.optim.AdamW(g, eps=1e-8 * unit))

        def backward(k, run=run, unit=unit):
            loss = unit * (run.model(batch(k)[0]) - batch(k)[1]).square().mean()
            loss.backward()
            return loss.detach()

        losses = run.train(20, backward=backward)
        curves.append([*(loss / unit for loss in losses), run.method.metrics()["rho"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_radius_never_passes_a_share_of_the_primarys_change(init):
    """However little the loss moves in comparison to what is asked for."""
    run = Run("bilora", MethodOptions(rho="auto", loss_rise=10.0), spec=replace(SPEC, init=init))
    weights = [layer.weight.detach() for layer in cast(Any, two_layers())[::2]]
    for k in range(STEPS):
        run.train(1, first=k)
        with run.method.evaluating():
            current_weights = [effective(layer) for _, layer in adapters.layers(run.model)]
        moved = math.hypot(
            *(float((a - b).norm()) for a, b in zip(current_weights, weights, strict=True))
        )
        assert run.method.metrics()["rho"] <= radius.LARGEST_SHARE * moved * (1 + 1e-9)
    assert run.method.metrics()["rho"] == pytest.approx(radius.LARGEST_SHARE * moved)


def effective(layer):
    """The weight that acts where the primary alone does."""
    inputs = torch.eye(layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        return (layer(inputs) - layer(torch.zeros_like(inputs))).T


def test_a_loop_of_ones_own_gives_the_loss():
    model = two_layers()
    bilora = attach(model, BiLoRAConfig(rank=3, rho="auto", target_modules=("0", "2")))
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=5e-3))
    bilora.bind(optimizer)
    for observed in (True, True, False):
        loss = (model(batch(0)[0]) - batch(0)[1]).square().mean()
        loss.backward()
        if observed:
            bilora.observe(loss)
            optimizer.step()
    assert bilora.auxiliary_norm() > 0
    with pytest.raises(UserError, match=r"observe\(loss\)"):
        optimizer.step()


class Plain(torch.optim.Optimizer):
    """Gradient descent that knows no `maximize`, as Prodigy and 8-bit AdamW."""

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
def test_every_step_is_projected_and_logged_under_a_schedule_and_accelerate(wrapped):
    run = bilora_run("AdamW", bound=False)
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
        norm = ball.frobenius_norm(adapters.factors(run.model, AUXILIARY))
        for value in (metrics["auxiliary_norm"], run.method.auxiliary_norm(), float(norm)):
            assert value == pytest.approx(RHO, rel=1e-12)
    groups = run.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 4] * 2)
    assert groups[1]["maximize"]
    with pytest.raises(UserError, match="twice"):
        run.method.bind(run.optimizer)


def test_bind_moves_to_a_new_optimizer_and_refuses_what_it_cannot_hook():
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


UP = {"maximize": True}


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda p, a: [{"params": p}], "lacks 4"),
        (lambda p, a: [{"params": a, **UP}], "lacks 4"),
        (lambda p, a: [{"params": p}, {"params": a}], "maximize=False"),
        (lambda p, a: [{"params": p + a, **UP}], "foreign"),
        (lambda p, a: [{"params": p}, {"params": a, "weight_decay": 0.1, **UP}], "decay=0.1"),
        (lambda p, a: [{"params": p, **UP}, {"params": a, **UP}], "of the primary"),
    ],
)
def test_bind_refuses_groups_that_would_train_otherwise(build, word):
    run = bilora_run(bound=False)
    optimizer = torch.optim.SGD(build(*(group["params"] for group in run.groups)), lr=0.1)
    with pytest.raises(UserError, match=word):
        run.method.bind(optimizer)


def test_an_optimizer_without_maximize_ascends_all_the_same():
    reached = []
    for kind in (torch.optim.SGD, Plain):
        run = bilora_run(kind)
        for k in range(4):
            run.backward(k)
            parameters = adapters.parameters(run.model, AUXILIARY)
            before = [cast(Tensor, p.grad).clone() for p in parameters]
            run.optimizer.step()
            pairs = zip(parameters, before, strict=True)
            assert all(torch.equal(cast(Tensor, p.grad), g) for p, g in pairs)
            run.optimizer.zero_grad()
        pair = (adapters.state_dict(run.model, name) for name in (PRIMARY, AUXILIARY))
        reached.append([value for state in pair for value in state.values()])
    torch.testing.assert_close(reached[0], reached[1], rtol=1e-12, atol=0)


def test_a_closure_is_refused_where_gradients_must_be_turned():
    run = bilora_run(Plain)
    with pytest.raises(UserError, match="closure"):
        run.optimizer.step(lambda: float(run.backward()))
    run.backward()
    run.optimizer.step(None)
    sgd_run = bilora_run()
    sgd_run.optimizer.step(lambda: float(sgd_run.backward()))
    assert sgd_run.method.metrics()["auxiliary_norm"] > 0
