"""Bi-LoRA against the naive reference, its limiting cases, and the ball after every step."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.methods import Method, MethodOptions, Target, create
from tests.references import bilora as reference


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + k)
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    return x, torch.randn(7, 5, dtype=torch.float64, generator=generator)


def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x) - y).square().mean().detach())


def run(
    method: Method, model: nn.Module, groups: list[dict[str, Any]], kind: str, steps: int
) -> list[float]:
    """Train on `batch(0)`, `batch(1)`, ...; returns the losses."""
    optimizer = getattr(torch.optim, kind)(groups)
    method.bind(optimizer)
    losses = []
    for k in range(steps):
        x, y = batch(k)

        def forward_backward(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss.detach()

        losses.append(float(method.step(forward_backward, optimizer)))
    return losses


def naive_copy(model: nn.Module) -> list[reference.Layer]:
    layers = []
    pairs = zip(adapters.factors(model, PRIMARY), adapters.factors(model, AUXILIARY), strict=True)
    for (first, second), (_, layer) in zip(pairs, adapters.layers(model), strict=True):
        frozen = cast(Any, layer).base_layer
        tensors = (frozen.weight, frozen.bias, first.A, first.B, second.A, second.B)
        copies = [t.detach().clone() for t in tensors]
        layers.append(reference.Layer(*copies, s1=first.scale, s2=second.scale))
    return layers


@pytest.mark.parametrize("rho_norm", ["scaled", "unscaled"])
@pytest.mark.parametrize(
    ("kind", "lr", "rho", "decay"),
    [("SGD", 0.1, 0.05, 0.0), ("AdamW", 5e-3, 0.05, 0.01), ("AdamW", 5e-3, 0.5, 0.0)],
)
def test_50_steps_follow_the_naive_reference(
    kind: str, lr: float, rho: float, decay: float, rho_norm: str
) -> None:
    """Acceptance: float64, with different ranks, scales and learning rates of the two adapters."""
    model = two_layers()
    options = MethodOptions(
        rho=rho,
        rho_norm=rho_norm,
        auxiliary_rank=2,
        auxiliary_alpha=3,
        auxiliary_learning_rate=2 * lr,
    )
    method = create("bilora", options)
    spec = AdapterSpec(rank=3, alpha=6, target_modules=("0", "2"))
    groups = method.setup([Target("model", model, spec, lr, decay)])
    layers = naive_copy(model)

    def rule(name: str) -> reference.SGD | reference.AdamW:
        ascend = name.endswith("2")
        rate = 2 * lr if ascend else lr
        if kind == "SGD":
            return reference.SGD(rate, ascend)
        return reference.AdamW(rate, 0.0 if ascend else decay, ascend)

    rules = [{name: rule(name) for name in ("B1", "A1", "B2", "A2")} for _ in layers]
    scaled = rho_norm == "scaled"
    losses, clipped = [], 0
    for k in range(50):
        losses.append(reference.step(layers, rules, *batch(k)))
        clipped += reference.clip(layers, rho, scaled) > rho
    found = run(method, model, groups, kind, 50)
    assert clipped >= 10, "the ball must have been at work"
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=1e-12)
    for name, letters in ((PRIMARY, ("A1", "B1")), (AUXILIARY, ("A2", "B2"))):
        for factor, layer in zip(adapters.factors(model, name), layers, strict=True):
            for tensor, letter in zip((factor.A, factor.B), letters, strict=True):
                torch.testing.assert_close(tensor, getattr(layer, letter), rtol=1e-12, atol=1e-12)


def trained(name: str, options: MethodOptions, kind: str) -> tuple[list[float], dict[str, Tensor]]:
    model = two_layers()
    method = create(name, options)
    spec = AdapterSpec(rank=3, target_modules=("0", "2"))
    torch.manual_seed(1)
    groups = method.setup([Target("model", model, spec, 0.02)])
    losses = run(method, model, groups, kind, 50)
    return losses, adapters.state_dict(model, PRIMARY)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_without_an_auxiliary_step_it_is_lora(kind: str) -> None:
    """Auxiliary learning rate 0, rho large: B2 stays zero, and the trajectory is LoRA's.

    Up to rounding: some processors' products add up in an order that depends on the rank.
    """
    options = MethodOptions(rho=1e5, auxiliary_learning_rate=0.0)
    losses, state = trained("bilora", options, kind)
    lora_losses, lora_state = trained("lora", MethodOptions(), kind)
    torch.testing.assert_close(losses, lora_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, lora_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_as_rho_goes_to_zero_it_becomes_lora(kind: str) -> None:
    lora_losses, _ = trained("lora", MethodOptions(), kind)
    gaps = []
    for rho in (1e-2, 1e-4, 1e-6):
        losses, _ = trained("bilora", MethodOptions(rho=rho), kind)
        gaps.append(max(abs(a - b) for a, b in zip(losses, lora_losses, strict=True)))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-5


def test_the_two_adapters_pull_in_opposite_directions() -> None:
    """With a frozen primary the auxiliary alone raises the loss, within the ball."""
    model = two_layers()
    method = create("bilora", MethodOptions(rho=0.1))
    spec = AdapterSpec(rank=3, target_modules=("0", "2"))
    groups = method.setup([Target("model", model, spec, 0.0)])
    groups[1]["lr"] = 0.05
    x, y = batch(0)
    before = error(model, x, y)
    run(method, model, groups, "SGD", 20)
    assert error(model, x, y) > before
    with method.evaluating():
        assert error(model, x, y) == before


def weight_change(layer: Any, scaled: bool) -> Tensor:
    """s B2 A2 of a linear or convolution layer, formed in float64."""
    A, B = (f[AUXILIARY].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
    change = torch.einsum(
        "mr,rnk->mnk", B.flatten(1), A.flatten(2) if A.dim() > 2 else A[..., None]
    )
    return change * (layer.scaling[AUXILIARY] if scaled else 1.0)


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    alphas=st.tuples(st.sampled_from([0.5, 2.0, 32.0]), st.sampled_from([0.5, 2.0, 32.0])),
    rho=st.floats(1e-3, 10),
    rho_norm=st.sampled_from(["scaled", "unscaled"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    kind=st.sampled_from(["SGD", "AdamW", "Adafactor"]),
)
def test_the_norm_is_within_rho_after_every_step(
    sizes: tuple[int, int, int],
    ranks: tuple[int, int],
    alphas: tuple[float, float],
    rho: float,
    rho_norm: str,
    dtype: torch.dtype,
    kind: str,
) -> None:
    """Acceptance: the norm of the products themselves, formed in float64; Conv2d among them."""
    n, h, m = sizes
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(n, h, 3, padding=1), nn.Flatten(2), nn.Linear(4, m), nn.Linear(m, m)
    ).to(dtype)
    options = MethodOptions(rho, rho_norm, auxiliary_rank=ranks[1], auxiliary_alpha=alphas[1])
    method = create("bilora", options)
    spec = AdapterSpec(rank=ranks[0], alpha=alphas[0], target_modules=("0", "2", "3"))
    groups = method.setup([Target("model", model, spec, 0.3)])
    optimizer = getattr(torch.optim, kind)(groups)
    method.bind(optimizer)
    for k in range(6):
        x = torch.randn(2, n, 2, 2, generator=torch.Generator().manual_seed(k)).to(dtype)
        model(x).float().sin().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        changes = [
            weight_change(layer, rho_norm == "scaled") for _, layer in adapters.layers(model)
        ]
        total = math.sqrt(math.fsum(float(change.square().sum()) for change in changes))
        assert total <= rho * (1 + 1e-6)
