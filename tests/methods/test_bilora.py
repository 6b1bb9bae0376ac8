"""Bi-LoRA against the naive reference, its limiting cases, and the ball after every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.methods import MethodOptions, Target, create
from tests.methods.runs import Run, batch, frozen
from tests.references import bilora as reference


def naive_copy(model: nn.Module) -> list[reference.Layer]:
    first, second = (adapters.factors(model, name) for name in (PRIMARY, AUXILIARY))
    layers = []
    for (W0, b), one, two in zip(frozen(model), first, second, strict=True):
        A1, B1, A2, B2 = (t.clone() for t in (one.A, one.B, two.A, two.B))
        layers.append(reference.Layer(W0, b, A1, B1, A2, B2, s1=one.scale, s2=two.scale))
    return layers


def project(layers: list[reference.Layer], rho: float, options: dict[str, Any]) -> None:
    """What follows a step under these options."""
    if options.get("ball") == "per-layer":
        reference.clip_each(layers, rho)
    elif options.get("ball") != "none":
        reference.clip(layers, rho, scaled=options.get("rho_norm") != "unscaled")


@pytest.mark.parametrize(
    ("kind", "lr", "rho", "decay", "options"),
    [
        *(
            (*optimizer, {"rho_norm": norm})
            for norm in ("scaled", "unscaled")
            for optimizer in (
                ("SGD", 0.1, 0.05, 0.0),
                ("AdamW", 5e-3, 0.05, 0.01),
                ("AdamW", 5e-3, 0.5, 0.0),
            )
        ),
        ("AdamW", 5e-3, 0.05, 0.0, {"ball": "per-layer"}),
        ("AdamW", 5e-3, 0.05, 0.0, {"ball": "none"}),
        ("AdamW", 5e-3, 0.05, 0.0, {"auxiliary_direction": "descent"}),
    ],
    ids=str,
)
def test_50_steps_follow_the_naive_reference(
    kind: str, lr: float, rho: float, decay: float, options: dict[str, Any]
) -> None:
    """Acceptance: float64, with different ranks, scales and learning rates of the two adapters."""
    given: dict[str, Any] = {"rho": rho, "auxiliary_rank": 2, "auxiliary_alpha": 3}
    given |= {"auxiliary_learning_rate": 2 * lr, **options}
    run = Run("bilora", MethodOptions(**given), kind, lr, decay)
    layers = naive_copy(run.model)

    def rule(name: str) -> reference.SGD | reference.AdamW:
        own = name.endswith("2")
        ascend, rate = own and "auxiliary_direction" not in options, 2 * lr if own else lr
        if kind == "SGD":
            return reference.SGD(rate, ascend)
        return reference.AdamW(rate, 0.0 if own else decay, ascend)

    rules = [{name: rule(name) for name in ("B1", "A1", "B2", "A2")} for _ in layers]
    losses, outside = [], 0
    for k in range(50):
        losses.append(reference.step(layers, rules, *batch(k)))
        outside += reference.c_norm(layers, options.get("rho_norm") != "unscaled") > rho
        project(layers, rho, options)
    assert outside >= 5, "the ball must have been at work"
    torch.testing.assert_close(run.train(50), losses, rtol=1e-12, atol=1e-12)
    for name, letters in ((PRIMARY, ("A1", "B1")), (AUXILIARY, ("A2", "B2"))):
        for factor, layer in zip(adapters.factors(run.model, name), layers, strict=True):
            for tensor, letter in zip((factor.A, factor.B), letters, strict=True):
                torch.testing.assert_close(tensor, getattr(layer, letter), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_as_rho_goes_to_zero_it_becomes_lora(kind: str) -> None:
    lora = Run("lora", None, kind, 0.02).train(50)
    gaps = []
    for rho in (1e-2, 1e-4, 1e-6):
        losses = Run("bilora", MethodOptions(rho=rho), kind, 0.02).train(50)
        gaps.append(max(abs(a - b) for a, b in zip(losses, lora, strict=True)))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-5


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
    given: dict[str, Any] = {"auxiliary_rank": ranks[1], "auxiliary_alpha": alphas[1]}
    # slow for the primary, that no run diverges
    method = create("bilora", MethodOptions(rho, rho_norm, auxiliary_learning_rate=0.3, **given))
    spec = AdapterSpec(rank=ranks[0], alpha=alphas[0], target_modules=("0", "2", "3"))
    optimizer = getattr(torch.optim, kind)(method.setup([Target("model", model, spec, 1e-4)]))
    method.bind(optimizer)
    scaled = rho_norm == "scaled"
    for k in range(6):
        x = torch.randn(2, n, 2, 2, generator=torch.Generator().manual_seed(k)).to(dtype)
        model(x).float().sin().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        changes = [weight_change(layer, scaled) for _, layer in adapters.layers(model)]
        total = math.sqrt(math.fsum(float(change.square().sum()) for change in changes))
        assert total <= rho * (1 + 1e-6)
