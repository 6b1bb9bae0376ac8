"""Profiles, planes, sharpness and eigenvalues on losses that are known exactly; exact restoring."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.func import functional_call, hessian

from eval.landscape import weights as spaces
from eval.landscape.sharpness import sharpness, top_eigenvalue

RHO = 0.3


class Quadratic:
    """L(w) = w^T H w / 2 + b^T w + 3 in float64, in two terms, w being a (4, 3) and a (2, 4)
    matrix, filters the rows of one and the columns of the other; H has eigenvalues of both signs
    unless told.
    """

    def __init__(self, seed, convex=False):
        random = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.tensors = [draw(4, 3), draw(2, 4)]
        unused = spaces.Weight("unused", torch.zeros(1, 1, dtype=torch.float64))
        self.weights = [
            spaces.Weight("a", self.tensors[0], 0),
            spaces.Weight("b", self.tensors[1], 1),
            unused,
        ]
        root = draw(20, 20)
        self._matrix, self._slope = root @ root.T if convex else root + root.T, draw(20)

    def loss(self):
        w = torch.cat([tensor.flatten() for tensor in self.tensors])
        yield w @ self._matrix @ w / 2
        yield self._slope @ w
        yield torch.tensor(3.0)

    @property
    def hessian(self):
        return self._matrix.numpy()

    def flat(self, parts):
        return np.concatenate([part.detach().numpy().ravel() for part in parts])[:20]

    def gradient(self):
        return self.hessian @ self.flat(self.tensors) + self._slope.numpy()


def directions(weights):
    return spaces.Direction(weights, 0, 0), spaces.Direction(weights, 0, 1)


def test_each_filter_gets_the_norm_of_its_weight_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    noise = torch.tensor([[1.0, 0.0], [5.0, 5.0], [3.0, -4.0]])
    rows = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.6, -0.8]])
    torch.testing.assert_close(spaces.filter_normalized(noise, weight), rows)
    columns = spaces.filter_normalized(noise, weight, filter_dim=1)
    # Squared norms of the columns by hand: 9.36 and 16.64 of the weight, 35 and 41 of the noise.
    expected = noise * torch.tensor([(9.36 / 35) ** 0.5, (16.64 / 41) ** 0.5])
    torch.testing.assert_close(columns, expected)
    kernel, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    found = spaces.filter_normalized(noise, kernel).flatten(1)  # an output channel is a filter
    torch.testing.assert_close(found.norm(dim=1), kernel.flatten(1).norm(dim=1))
    assert torch.cosine_similarity(found, noise.flatten(1)).min() > 0.9999


def test_a_quadratics_profile_and_plane_have_the_curvature_of_its_hessian():
    problem = Quadratic(seed=4)
    both = directions(problem.weights)
    d = np.stack([problem.flat(one) for one in both])
    positions = spaces.coordinates(0.5, 21)
    assert (positions[0], positions[10], positions[20]) == (-0.5, 0.0, 0.5)
    losses = spaces.line(problem.weights, problem.loss, both[1], positions)
    fitted = np.polyfit(positions, losses, 2)
    assert 2 * fitted[0] == pytest.approx(d[1] @ problem.hessian @ d[1], rel=0.01)
    assert fitted[1] == pytest.approx(problem.gradient() @ d[1], rel=0.01)
    positions = spaces.coordinates(1.0, 5)
    found = np.array(spaces.plane(problem.weights, problem.loss, both, positions))
    step = positions[1] - positions[0]
    for axis, column in ((0, found[:, 2]), (1, found[2, :])):
        curvature = (column[3] - 2 * column[2] + column[1]) / step**2
        assert curvature == pytest.approx(d[axis] @ problem.hessian @ d[axis], rel=0.01)
    corners = found[3, 3] - found[3, 1] - found[1, 3] + found[1, 1]
    assert corners / (4 * step**2) == pytest.approx(d[0] @ problem.hessian @ d[1], rel=0.01)
    assert losses[10] == found[2, 2] == spaces.evaluate(problem.loss)


@pytest.mark.parametrize("fails_at", [None, 2])
@pytest.mark.parametrize(
    ("look", "dtype"),
    [
        (
            lambda w, f: spaces.line(w, f, directions(w)[0], spaces.coordinates(1.0, 5)),
            torch.bfloat16,
        ),
        (
            lambda w, f: spaces.plane(w, f, directions(w), spaces.coordinates(1.0, 3)),
            torch.bfloat16,
        ),
        (lambda w, f: sharpness(w, f, RHO), torch.float32),
        (top_eigenvalue, torch.float32),
    ],
    ids=["line", "plane", "sharpness", "eigenvalue"],
)
def test_weights_and_flags_are_restored_bit_for_bit(look, dtype, fails_at):
    layer = nn.Linear(5, 3).requires_grad_(False).to(dtype)
    before, memory, calls = layer.weight.clone(), layer.weight.data_ptr(), 0

    def loss():
        nonlocal calls
        if calls == fails_at:
            raise RuntimeError("out of memory")
        calls += 1
        return layer(torch.ones(2, 5, dtype=dtype)).pow(2).sum()

    weights = [spaces.Weight("layer", layer.weight)]
    if fails_at is None:
        look(weights, loss)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            look(weights, loss)
    assert torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == memory
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_a_quadratics_sharpness_agrees_with_scipy(convex, rho):
    problem = Quadratic(seed=5, convex=convex)
    slope, matrix = problem.gradient(), problem.hessian

    def negative(x):
        e = rho * x / max(1.0, float(np.linalg.norm(x)))  # covers the ball
        return -float(slope @ e + e @ matrix @ e / 2)

    starts = [slope, *np.random.default_rng(0).normal(size=(12, 20))]
    highest = max(-minimize(negative, x, method="BFGS").fun for x in starts)
    found = sharpness(problem.weights, problem.loss, rho, steps=150, restarts=2)
    assert found.value == pytest.approx(highest, rel=1e-4)
    assert found.distance <= rho * (1 + 1e-12)
    assert found.gradient_norm == pytest.approx(np.linalg.norm(slope))


def test_where_the_rise_is_known():
    w = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    found = sharpness([spaces.Weight("w", w)], lambda: -(w**2).sum(), 5.0, steps=60)
    assert found.value == pytest.approx(0.13, rel=1e-6)  # a maximum inside the ball is not left
    assert found.distance == pytest.approx(0.13**0.5, rel=1e-3)
    w = torch.zeros(1, 3, dtype=torch.float64)  # at a stationary point only a restart finds a rise
    for restarts, rise in ((0, 0.0), (1, RHO**2)):
        found = sharpness([spaces.Weight("w", w)], lambda: (w**2).sum(), RHO, restarts=restarts)
        assert found.value == pytest.approx(rise)


class Attending(nn.Module):
    """A small network with attention, 43 weights in all, some of which make no difference."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 3)
        self.query = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        hidden = self.embed(x)
        query, keys = self.query(hidden)[:, None], hidden[:, None]
        mixed = nn.functional.scaled_dot_product_attention(query, keys, keys)
        return self.out(torch.tanh(mixed[:, 0]))


def small_network(sign):
    """Weights, a loss in terms, and its exact Hessian."""
    torch.manual_seed(0)
    model = Attending().double()
    x, y = torch.randn(6, 4, 2).double(), torch.randn(6, 4, 2).double()
    own = dict(model.named_parameters())

    def loss():
        for rows in (slice(0, 3), slice(3, 6)):
            yield sign * (model(x[rows]) - y[rows]).pow(2).mean() / 2

    def of(flat):
        parts = flat.split([p.numel() for p in own.values()])
        shaped = {n: one.view(p.shape) for one, (n, p) in zip(parts, own.items(), strict=True)}
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            return sign * (functional_call(model, shaped, (x,)) - y).pow(2).mean()

    flat = torch.cat([p.detach().flatten() for p in own.values()])
    with torch.no_grad():
        assert spaces.evaluate(loss) == pytest.approx(float(of(flat)), rel=1e-12)
    weights = [spaces.Weight(name, parameter) for name, parameter in own.items()]
    return weights, loss, hessian(of)(flat).detach().numpy()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_top_eigenvalue_of_a_network_equals_numpys(sign):
    weights, loss, exact = small_network(sign)
    np.testing.assert_allclose(exact, exact.T, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(exact)
    found = top_eigenvalue(weights, loss, tolerance=1e-9, max_restarts=200)
    assert found.value == pytest.approx(eigenvalues[-1], rel=1e-6)
    assert found.residual < 1e-6
    assert top_eigenvalue(weights, loss).value == pytest.approx(eigenvalues[-1], rel=0.01)
    undone = top_eigenvalue(weights, loss, tolerance=1e-14, max_restarts=1, vectors=3)
    assert undone.value is None  # Lanczos that does not converge says so
    assert undone.products > 0
    # Algebraically the largest: with the sign turned, the largest in magnitude is negative.
    assert (abs(eigenvalues[0]) > eigenvalues[-1]) == (sign < 0)
