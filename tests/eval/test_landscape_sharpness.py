"""SAM sharpness against closed forms and scipy's optimum; top eigenvalues against numpy's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, hessian

from eval.landscape.sharpness import sharpness, top_eigenvalue
from eval.landscape.weights import Weight, evaluate
from tests.eval.landscapes import Quadratic

RHO = 0.3


def _rise(problem: Quadratic, e: Any) -> float:
    return float(problem.gradient() @ e + e @ problem.hessian @ e / 2)


def _highest_rise(problem: Quadratic, rho: float) -> float:
    """By scipy from many starts: e = rho x / max(1, ||x||) covers the ball."""

    def negative(x: Any) -> float:
        return -_rise(problem, rho * x / max(1.0, float(np.linalg.norm(x))))

    random = np.random.default_rng(0)
    starts = [problem.gradient(), *random.normal(size=(12, 20))]
    return max(-minimize(negative, x, method="BFGS").fun for x in starts)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_a_quadratics_sharpness_agrees_with_scipy(convex: bool, rho: float) -> None:
    problem = Quadratic(seed=5, convex=convex)
    found = sharpness(problem.weights, problem.loss, rho, steps=150, restarts=2)
    assert found.value == pytest.approx(_highest_rise(problem, rho), rel=1e-4)
    assert found.distance <= rho * (1 + 1e-12)


def test_where_the_rise_is_known() -> None:
    w = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    found = sharpness([Weight("w", w)], lambda: -(w**2).sum(), 5.0, steps=60)
    assert found.value == pytest.approx(0.13, rel=1e-6)  # a maximum inside the ball is not left
    assert found.distance == pytest.approx(0.13**0.5, rel=1e-3)
    w = torch.zeros(1, 3, dtype=torch.float64)  # at a stationary point only a restart finds a rise
    for restarts, rise in ((0, 0.0), (1, RHO**2)):
        found = sharpness([Weight("w", w)], lambda: (w**2).sum(), RHO, restarts=restarts)
        assert found.value == pytest.approx(rise)


class Attending(nn.Module):
    """A small network with attention, 43 weights in all, some of which make no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 3)
        self.query = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        query = self.query(hidden)
        mixed = nn.functional.scaled_dot_product_attention(
            query[:, None], hidden[:, None], hidden[:, None]
        )
        return self.out(torch.tanh(mixed[:, 0]))


def small_network(sign: float) -> tuple[list[Weight], Any, Any]:
    """Weights, a loss in terms, and its exact Hessian."""
    torch.manual_seed(0)
    model = Attending().double()
    x, y = torch.randn(6, 4, 2).double(), torch.randn(6, 4, 2).double()
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    weights = [Weight(name, parameter) for name, parameter in model.named_parameters()]

    def loss() -> Iterator[Tensor]:
        for start in (0, 3):
            rows = slice(start, start + 3)
            yield sign * (model(x[rows]) - y[rows]).pow(2).mean() / 2

    def of(flat: Tensor) -> Tensor:
        parts = dict(zip(names, flat.split(sizes), strict=True))
        own = {name: parts[name].view(p.shape) for name, p in model.named_parameters()}
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            return sign * (functional_call(model, own, (x,)) - y).pow(2).mean()

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        assert evaluate(loss) == pytest.approx(float(of(flat)), rel=1e-12)
    return weights, loss, hessian(of)(flat).detach().numpy()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_top_eigenvalue_of_a_network_equals_numpys(sign: float) -> None:
    weights, loss, exact = small_network(sign)
    np.testing.assert_allclose(exact, exact.T, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(exact)
    found = top_eigenvalue(weights, loss, tolerance=1e-9, max_restarts=200)
    assert found.value == pytest.approx(eigenvalues[-1], rel=1e-6)
    assert found.residual is not None
    assert found.residual < 1e-6
    loose = top_eigenvalue(weights, loss)
    assert loose.value == pytest.approx(eigenvalues[-1], rel=0.01)
    undone = top_eigenvalue(weights, loss, tolerance=1e-14, max_restarts=1, vectors=3)
    assert undone.value is None  # Lanczos that does not converge says so
    assert undone.products > 0
    # Algebraically the largest: with the sign turned, the largest in magnitude is negative.
    assert (abs(eigenvalues[0]) > eigenvalues[-1]) == (sign < 0)
