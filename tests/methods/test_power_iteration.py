"""Power iteration for the auxiliary: against its naive reference, and its theory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, AdapterSpec
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.families.sdxl import encode
from bilora_diffusion.methods import MethodOptions, Target, ball, create
from tests.contract.models import tiny_clip
from tests.methods.runs import SPEC, STEPS, Run, batch, two_layers
from tests.methods.test_bilora import naive_copy
from tests.references import bilora as reference

RHO, LR = 0.05, 5e-3


def power(**options: Any) -> Run:
    given = {"auxiliary_rank": 2, "auxiliary_alpha": 3, "auxiliary_update": "power", **options}
    return Run("bilora", MethodOptions(rho=RHO, **given), lr=LR)


@pytest.mark.parametrize(
    ("direction", "missing"),
    [
        ("ascent", {}),
        ("descent", {}),
        ("ascent", {0: {1}, 3: {1}, 4: {1}, 7: {0}, 8: {1}}),
        ("descent", {k: {1} for k in range(STEPS)}),
    ],
)
def test_power_iteration_follows_its_reference(
    direction: str, missing: dict[int, set[int]]
) -> None:
    """`missing` are the layers that have no gradient, by step."""
    run = power(auxiliary_direction=direction)
    layers = naive_copy(run.model)
    naive = reference.Power(
        [layer.A2.clone() for layer in layers], RHO, 1.0 if direction == "ascent" else -1.0
    )
    for layer in layers:
        eye = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(layer.A2 @ layer.A2.T, eye, rtol=0, atol=1e-12)
        layer.W0, layer.s2 = layer.W0.clone(), 0.0
    base = [layer.W0.clone() for layer in layers]
    rule = [{name: reference.AdamW(LR, 0.0, False) for name in ("B1", "A1")} for _ in layers]
    losses, auxiliary = [], []
    for k in range(STEPS):
        without = missing.get(k, set())
        loss, found = reference.loss_and_weight_gradients(layers, *batch(k))
        gradients = [None if i in without else dW for i, dW in enumerate(found)]
        losses.append(loss)
        for layer, dW, own in zip(layers, gradients, rule, strict=True):
            if dW is not None:
                parts = reference.factor_gradients(layer, dW)
                new = {n: own[n].update(getattr(layer, n), parts[n]) for n in ("B1", "A1")}
                layer.B1, layer.A1 = new["B1"], new["A1"]
        auxiliary = naive.update(gradients)
        for layer, W, E in zip(layers, base, auxiliary, strict=True):
            layer.W0 = W + E  # E takes the place of s2 B2 A2

    def backward(k: int) -> Tensor:
        loss = run.backward(k)
        for i in missing.get(k, ()):
            for parameter in run.model[(0, 2)[i]].parameters():
                parameter.grad = None
        return loss

    torch.testing.assert_close(run.train(backward=backward), losses, rtol=1e-10, atol=1e-10)
    for f, E in zip(adapters.factors(run.model, AUXILIARY), auxiliary, strict=True):
        product = f.scale * f.B @ f.A
        torch.testing.assert_close(product, E.expand_as(product), rtol=1e-10, atol=1e-10)
    assert run.method.metrics()["auxiliary_norm"] == pytest.approx(RHO, rel=1e-6)


def test_power_iteration_moves_what_sdxl_reads_of_its_text_encoders() -> None:
    """SDXL reads the last but one hidden state, so the last layer never has a gradient."""
    first, second = tiny_clip(), tiny_clip(projection=True)
    method = create("bilora", MethodOptions(rho=RHO, auxiliary_update="power"))
    spec = AdapterSpec(rank=3)
    targets = [Target(n, m, spec, LR) for n, m in (("one", first), ("two", second))]
    optimizer = torch.optim.AdamW(method.setup(targets))
    method.bind(optimizer)
    ids = torch.arange(1, 13).view(2, 6)
    ids[:, -1] = first.config.eos_token_id  # where the pooled output is taken

    def forward_backward() -> Tensor:
        read = encode((first, second), (ids, ids))
        loss = read["sequence"].square().mean() + (read["pooled"] - 1).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(4):
        method.step(forward_backward, optimizer)
    moved = {f.name: bool(f.B.any()) for t in targets for f in factors_named(t)}
    still = {name for name, moves in moved.items() if not moves}
    assert still == {name for name in moved if name.startswith("one.encoder.layers.1.")}
    assert method.metrics()["auxiliary_norm"] == pytest.approx(RHO, rel=1e-6)
    norms = [float(ball.frobenius_norm(adapters.factors(t.model, AUXILIARY))) for t in targets]
    assert min(norms) > 0
    assert math.hypot(*norms) == pytest.approx(RHO, rel=1e-6)  # one ball bounds both
    # each half was taken twice where there is a gradient: A is the one that is orthonormal
    for f in (f for target in targets for f in factors_named(target) if moved[f.name]):
        gram = f.A @ f.A.T
        eye = torch.eye(3) * gram[0, 0]
        torch.testing.assert_close(gram, eye, rtol=1e-4, atol=1e-5 * float(gram[0, 0]))
    saved = method.state_dict()
    method.load_state_dict(saved)
    assert method.state_dict() == saved


def factors_named(target: Target) -> list[adapters.Factors]:
    own = adapters.factors(target.model, AUXILIARY)
    return [f._replace(name=f"{target.name}.{f.name.removeprefix('text_model.')}") for f in own]


class FixedGradient(nn.Module):
    """Two weights whose gradients are G1 and G2 whatever the weights are: L = sum <G_i, W_i>."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(12, 9, bias=False), nn.Linear(7, 15, bias=False)
        self.double()
        self.G = [torch.randn(9, 12).double(), 3 * torch.randn(15, 7).double()]

    def forward(self) -> Tensor:
        # <G, W> = sum_j <G e_j, W e_j>, with the columns e_j of the identity as the layer's inputs.
        pairs = zip(self.G, (self.a, self.b), strict=True)
        return sum(
            ((layer(torch.eye(G.shape[1]).double()) * G.T).sum() for G, layer in pairs),
            start=torch.zeros((), dtype=torch.float64),
        )

    def best(self, rank: int, rho: float) -> list[Tensor]:
        """rho U_r S_r V_r^T / ||S_r||_F, with the norm over both layers."""
        parts = []
        for G in self.G:
            U, S, Vh = torch.linalg.svd(G, full_matrices=False)
            parts.append(U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank])
        length = math.sqrt(sum(float(part.square().sum()) for part in parts))
        return [rho / length * part for part in parts]


def gains(update: str, lr: float, steps: int, rank: int = 3) -> tuple[list[float], list[Tensor]]:
    """The ascent gain <G, E> after each step against a fixed gradient, and the last E."""
    model = FixedGradient()
    method = create("bilora", MethodOptions(rho=RHO, auxiliary_update=update))
    spec = AdapterSpec(rank=rank, alpha=5, target_modules=("a", "b"))
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(method.setup([Target("model", model, spec, lr)]))
    method.bind(optimizer)

    def forward_backward() -> Tensor:
        loss = model()
        loss.backward()
        return loss.detach()

    reached, E = [], []
    for _ in range(steps):
        method.step(forward_backward, optimizer)
        E = [f.scale * f.B @ f.A for f in adapters.factors(model, AUXILIARY)]
        reached.append(sum(float((g * e).sum()) for g, e in zip(model.G, E, strict=True)))
        assert math.sqrt(sum(float(e.square().sum()) for e in E)) <= RHO * (1 + 1e-6)
    auxiliary = [p for g in optimizer.param_groups if g.get("maximize") for p in g["params"]]
    if update == "power":
        assert not any(parameter in optimizer.state for parameter in auxiliary)
    return reached, E


def test_power_iteration_converges_to_the_best_perturbation_of_its_rank() -> None:
    reached, E = gains("power", 1e-3, 300)
    for found, best in zip(E, FixedGradient().best(3, RHO), strict=True):
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)
    rises = [b - a for a, b in itertools.pairwise(reached)]
    assert min(rises) > -1e-12 * max(reached)


@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2, 1e-1])
def test_power_iteration_gains_at_least_what_the_optimizer_does(lr: float) -> None:
    power, _ = gains("power", lr, 100)
    default, _ = gains("optimizer", lr, 100)
    assert all(p >= d * (1 - 1e-9) for p, d in zip(power, default, strict=True))


def test_power_iteration_refuses_a_rank_that_a_layer_has_not() -> None:
    method = create("bilora", MethodOptions(auxiliary_update="power", auxiliary_rank=7))
    with pytest.raises(UserError, match="lower auxiliary_rank"):
        method.setup([Target("model", two_layers(), SPEC, LR)])


def test_power_iteration_survives_a_zero_gradient() -> None:
    run = power()

    def backward(k: int) -> Tensor:
        loss = 0 * run.model(batch(k)[0]).sum()
        loss.backward()
        return loss.detach()

    run.train(4, backward=backward)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert run.method.metrics()["auxiliary_norm"] == 0
