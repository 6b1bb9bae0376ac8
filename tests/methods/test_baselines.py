"""The baselines against their naive references, step by step in float64, and their limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import L2SPOptions, MethodOptions, Target, create, names
from bilora_diffusion.seeds import seed_of
from tests.methods.runs import SPEC, STEPS, Run, batch, frozen
from tests.references import baselines as reference
from tests.references.bilora import SGD, AdamW

OPTIMIZERS = [("SGD", 0.1, 0.0), ("AdamW", 5e-3, 0.01)]
each_optimizer = pytest.mark.parametrize(("kind", "lr", "decay"), OPTIMIZERS)


def naive(run: Run) -> list[reference.Layer]:
    return [
        reference.Layer(W0, b, f.A.clone(), f.B.clone(), f.scale)
        for (W0, b), f in zip(frozen(run.model), adapters.factors(run.model, PRIMARY), strict=True)
    ]


def rules(kind: str, lr: float, decay: float, names: tuple[str, ...] = ("A", "B")) -> Any:
    def rule() -> SGD | AdamW:
        return SGD(lr, False) if kind == "SGD" else AdamW(lr, decay, False)

    return [{name: rule() for name in names} for _ in range(2)]


def same_factors(run: Run, layers: list[reference.Layer]) -> None:
    for factors, layer in zip(adapters.factors(run.model, PRIMARY), layers, strict=True):
        torch.testing.assert_close(factors.A, layer.A, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(factors.B, layer.B, rtol=1e-10, atol=1e-10)


def follow(run: Run, naive_step: Callable[[list[reference.Layer], int], float]) -> None:
    layers = naive(run)
    expected = [naive_step(layers, k) for k in range(STEPS)]
    torch.testing.assert_close(run.train(), expected, rtol=1e-10, atol=1e-10)
    same_factors(run, layers)


@each_optimizer
def test_lora_and_lora_sam(kind: str, lr: float, decay: float) -> None:
    run, rule = Run("lora", None, kind, lr, decay), rules(kind, lr, decay)
    follow(run, lambda layers, k: reference.lora(layers, rule, *batch(k)))
    run, rule = Run("lora-sam", MethodOptions(rho=0.2), kind, lr, decay), rules(kind, lr, decay)
    assert run.method.metrics() == {}
    follow(run, lambda layers, k: reference.lora_sam(layers, rule, *batch(k), rho=0.2))
    assert run.passes == 2 * STEPS
    assert run.method.metrics()["sharpness"] > 0


@pytest.mark.parametrize("init", ["default", "pissa"])
@each_optimizer
def test_l2sp_penalizes_the_change_of_the_weights(
    kind: str, lr: float, decay: float, init: str
) -> None:
    options = MethodOptions(own=L2SPOptions(l2sp_lambda=0.3))
    run = Run("lora-l2sp", options, kind, lr, decay, replace(SPEC, init=init))
    rule, before = rules(kind, lr, decay), [layer.weight() for layer in naive(run)]
    terms: Any = {"strength": 0.3, "before": before}
    follow(run, lambda layers, k: reference.l2sp(layers, rule, *batch(k), **terms))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("name", ["oBAR", "nBAR"])
@each_optimizer
def test_bar(kind: str, lr: float, decay: float, name: str, schedule: str) -> None:
    options = MethodOptions(bar_alpha=2.0, bar_schedule=schedule, num_steps=STEPS)
    run, rule = Run(f"lora-{name}".lower(), options, kind, lr, decay), rules(kind, lr, decay)
    falls = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }[schedule]

    def step(layers: list[reference.Layer], k: int) -> float:
        alpha = 2.0 * falls((k + 1) / STEPS)
        return reference.bar(layers, rule, *batch(k), strength=alpha, lr=lr, kind=name)

    follow(run, step)


@pytest.mark.parametrize("way", ["prepared", "resumed"])
@pytest.mark.parametrize("name", ["oBAR", "nBAR"])
def test_bar_follows_a_warm_up_although_the_optimizers_groups_are_replaced(
    name: str, way: str
) -> None:
    """accelerate's `prepare` and a resume put new dictionaries into `param_groups`."""
    strength, lr = 2.0, 0.1
    run = Run(f"lora-{name}".lower(), MethodOptions(bar_alpha=strength), "SGD", lr)

    def warm_up() -> LambdaLR:
        return LambdaLR(run.optimizer, lambda k: min(1.0, k / (STEPS // 2)))

    schedule, groups = warm_up(), list(run.optimizer.param_groups)
    if way == "prepared":
        Accelerator(cpu=True).prepare(run.optimizer)
    layers, rule = naive(run), rules("SGD", lr, 0.0)
    for k in range(STEPS):
        if way == "resumed" and k == STEPS // 4:
            saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
            position, state = schedule.state_dict(), run.method.state_dict()
            run = Run(run.method.name, run.method.options, "SGD", lr)
            run.model.load_state_dict(saved[0])
            schedule, groups = warm_up(), list(run.optimizer.param_groups)
            run.optimizer.load_state_dict(saved[1])
            schedule.load_state_dict(position)
            run.method.load_state_dict(state)
        rate = lr * min(1.0, k / (STEPS // 2))
        for each in rule:
            each["A"].lr = each["B"].lr = rate
        reference.bar(layers, rule, *batch(k), strength=strength, lr=rate, kind=name)
        run.train(1, first=k)
        schedule.step()
    assert all(a is not b for a, b in zip(groups, run.optimizer.param_groups, strict=True))
    same_factors(run, layers)


@each_optimizer
def test_flat_lora(kind: str, lr: float, decay: float) -> None:
    options = MethodOptions(rho=0.3, num_steps=STEPS, seed=5)
    run, rule = Run("flat-lora", options, kind, lr, decay), rules(kind, lr, decay)

    def step(layers: list[reference.Layer], k: int) -> float:
        normal = []
        for layer, path in zip(layers, ("0", "2"), strict=True):
            seed = seed_of(5, "flat-lora", k + 1, f"model.{path}")
            generator = torch.Generator().manual_seed(seed)
            normal.append(torch.randn(layer.W0.shape, generator=generator, dtype=torch.float64))
        return reference.flat_lora(
            layers, rule, *batch(k), rho=0.3, progress=(k + 1) / STEPS, normal=normal
        )

    follow(run, step)


@each_optimizer
def test_full(kind: str, lr: float, decay: float) -> None:
    run, rule = Run("full", None, kind, lr, decay), rules(kind, lr, decay, ("W0", "b"))
    modules, empty = [run.model[i] for i in (0, 2)], torch.zeros(0)
    layers = [
        reference.Layer(m.weight.detach().clone(), m.bias.detach().clone(), empty, empty, 1.0)
        for m in modules
    ]
    expected = [reference.full(layers, rule, *batch(k)) for k in range(STEPS)]
    torch.testing.assert_close(run.train(), expected, rtol=1e-10, atol=1e-10)
    for layer, module in zip(layers, modules, strict=True):
        torch.testing.assert_close(module.weight.detach(), layer.W0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(module.bias.detach(), layer.b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in names() if name not in ("lora", "full")])
def test_a_layer_without_a_gradient_is_left_alone_and_the_others_go_on(name: str) -> None:
    """The output does not reach the last layer (SDXL's text encoders have such a one)."""
    options = MethodOptions(rho=0.3, bar_alpha=2.0, num_steps=STEPS)
    run = Run(name, options, "AdamW", 0.05, 0.01)
    only = replace(SPEC, target_modules=("0",))
    without = Run(name, options, "AdamW", 0.05, 0.01, spec=only)
    for key, own in without.method.tensors().items():
        own.copy_(run.method.tensors()[key])
    last = {key: v.clone() for key, v in run.primary().items() if key.startswith("2.")}
    losses = []
    for each in (run, without):

        def backward(k: int, first: Any = each.model[:2]) -> Tensor:
            loss = (first(batch(0)[0]) - 1).square().mean()
            loss.backward()
            return loss.detach()

        losses.append(each.train(backward=backward))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(run.primary()[key], value) for key, value in last.items())


@pytest.mark.parametrize(
    ("name", "number"),
    [("lora-sam", 2), ("flat-lora", 1), ("lora-msam", 1), ("efm-lora", 1), ("lora-looksam", 2)],
)
def test_a_failing_pass_leaves_no_perturbation(name: str, number: int) -> None:
    run = Run(name, MethodOptions(rho=0.5, num_steps=STEPS), "AdamW", 0.01)
    run.train(5)  # the next is a look of LookSAM
    before = copy.deepcopy(run.model.state_dict())
    run.passes = 0

    def fails(k: int) -> Tensor:
        if run.passes == number - 1:
            raise RuntimeError("boom")
        return run.backward(k)

    with pytest.raises(RuntimeError, match="boom"):
        run.train(1, backward=fails)
    after = run.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_flat_lora_restores_narrow_weights_exactly_after_200_steps() -> None:
    """Acceptance: the difference is 0, where adding and subtracting in bf16 would drift."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()
    base = [cast(Any, model[i]).weight.detach().clone() for i in (0, 2)]
    method = create("flat-lora", MethodOptions(rho=0.1, num_steps=200))
    optimizer = torch.optim.AdamW(method.setup([Target("model", model, SPEC, 1e-3)]))
    layers = [layer for _, layer in adapters.layers(model)]
    x, seen = torch.randn(16, 64).bfloat16(), []

    def forward_backward() -> Tensor:
        pairs = zip((adapters.base_weight(layer) for layer in layers), base, strict=True)
        seen.append(max(float((now - w).float().norm() / w.float().norm()) for now, w in pairs))
        loss = model(x).float().square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(200):
        method.step(forward_backward, optimizer)
    for layer, weight in zip(layers, base, strict=True):
        assert torch.equal(adapters.base_weight(layer), weight)
    assert seen[-1] == pytest.approx(0.1, rel=0.1)  # rho times the weight's norm at the end
    assert seen[0] < 1e-3


def test_full_fine_tuning_refuses_narrow_weights_and_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(UserError, match="float32"):
        create("full").setup([Target("unet", model.bfloat16(), SPEC, 1e-3)])
    monkeypatch.setattr("bilora_diffusion.methods.full.free_memory", lambda device: 16 * 12 - 60)
    with pytest.raises(UserError, match=r"unet: 0\.0 M weights need"):
        create("full").setup([Target("unet", model.float(), SPEC, 1e-3)])
    less = MethodOptions(optimizer="adamw8bit")  # fits where AdamW does not
    assert create("full", less).setup([Target("unet", model, SPEC, 1e-3)])


def test_a_schedule_without_a_length_is_refused() -> None:
    run = Run("flat-lora")
    with pytest.raises(UserError, match="num_steps"):
        run.train(1)
    assert run.method.depends_on_length
    assert not any(create(name).depends_on_length for name in ("bilora", "lora-obar"))
