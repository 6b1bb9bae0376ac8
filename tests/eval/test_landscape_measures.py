"""Profiles, planes and sharpness on losses that are known exactly; exact restoring."""

import contextlib

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from eval import landscape_surface as surface
from eval.landscape_surface import Weight, sharpness

RHO = 0.3


class Quadratic:
    """L(w) = w^T H w / 2 + b^T w + 3 in float64, in two terms, w being a (4, 3) and a (2, 4)
    matrix, filters the rows of one and the columns of the other; H has eigenvalues of both signs
    unless it is convex.
    """

    def __init__(self, seed, convex=False):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.tensors = [normal(4, 3), normal(2, 4)]
        unused = Weight("unused", torch.zeros(1, 1, dtype=torch.float64))
        self.weights = [
            Weight("a", self.tensors[0], 0),
            Weight("b", self.tensors[1], 1),
            unused,
        ]
        root = normal(20, 20)
        self._matrix, self._slope = root @ root.T if convex else root + root.T, normal(20)

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
    return surface.Direction(weights, 0, 0), surface.Direction(weights, 0, 1)


def test_each_filter_gets_the_norm_of_its_weight_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    noise = torch.tensor([[1.0, 0.0], [5.0, 5.0], [3.0, -4.0]])
    rows = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.6, -0.8]])
    torch.testing.assert_close(surface.filter_normalized(noise, weight), rows)
    columns = surface.filter_normalized(noise, weight, filter_dim=1)
    # Squared norms of the columns by hand: 9.36 and 16.64 of the weight, 35 and 41 of the noise.
    expected = noise * torch.tensor([(9.36 / 35) ** 0.5, (16.64 / 41) ** 0.5])
    torch.testing.assert_close(columns, expected)
    kernel, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    direction = surface.filter_normalized(noise, kernel).flatten(1)  # a filter per output channel
    torch.testing.assert_close(direction.norm(dim=1), kernel.flatten(1).norm(dim=1))
    assert torch.cosine_similarity(direction, noise.flatten(1)).min() > 0.9999


def test_a_quadratics_profile_and_plane_have_the_curvature_of_its_hessian():
    problem = Quadratic(seed=4)
    both = directions(problem.weights)
    d = np.stack([problem.flat(direction) for direction in both])
    positions = surface.coordinates(0.5, 21)
    assert (positions[0], positions[10], positions[20]) == (-0.5, 0.0, 0.5)
    losses = surface.line(problem.weights, problem.loss, both[1], positions)
    fitted = np.polyfit(positions, losses, 2)
    assert 2 * fitted[0] == pytest.approx(d[1] @ problem.hessian @ d[1], rel=0.01)
    assert fitted[1] == pytest.approx(problem.gradient() @ d[1], rel=0.01)
    positions = surface.coordinates(1.0, 5)
    grid = np.array(surface.plane(problem.weights, problem.loss, both, positions))
    step = positions[1] - positions[0]
    for axis, column in ((0, grid[:, 2]), (1, grid[2, :])):
        curvature = (column[3] - 2 * column[2] + column[1]) / step**2
        assert curvature == pytest.approx(d[axis] @ problem.hessian @ d[axis], rel=0.01)
    corners = grid[3, 3] - grid[3, 1] - grid[1, 3] + grid[1, 1]
    assert corners / (4 * step**2) == pytest.approx(d[0] @ problem.hessian @ d[1], rel=0.01)
    assert losses[10] == grid[2, 2] == surface.evaluate(problem.loss)


@pytest.mark.parametrize("fails_at", [None, 2])
@pytest.mark.parametrize("kind", ["plane", "sharpness"])
def test_weights_and_flags_are_restored_bit_for_bit(kind, fails_at):
    dtype = torch.bfloat16 if kind == "plane" else torch.float32
    layer = nn.Linear(5, 3).requires_grad_(False).to(dtype)
    values, memory, calls = layer.weight.clone(), layer.weight.data_ptr(), 0

    def loss():
        nonlocal calls
        if calls == fails_at:
            raise RuntimeError("out of memory")
        calls += 1
        yield layer(torch.ones(2, 5, dtype=dtype)).pow(2).sum()

    weights = [Weight("layer", layer.weight)]
    fails = pytest.raises(RuntimeError, match="out of memory")
    with contextlib.nullcontext() if fails_at is None else fails:
        if kind == "plane":
            surface.plane(weights, loss, directions(weights), surface.coordinates(1.0, 3))
        else:
            sharpness(weights, loss, RHO)
    assert torch.equal(layer.weight, values)
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
    assert sharpness(problem.weights, problem.loss, rho, 150) == pytest.approx(highest, rel=1e-4)


def test_where_the_rise_is_known():
    w = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    rise = sharpness([Weight("w", w)], lambda: [-(w**2).sum()], 5.0, steps=60)
    assert rise == pytest.approx(0.13, rel=1e-6)  # a maximum inside the ball is not left
    w = torch.zeros(1, 3, dtype=torch.float64)  # no gradient leads away from a stationary point
    assert sharpness([Weight("w", w)], lambda: [(w**2).sum()], RHO) == 0
