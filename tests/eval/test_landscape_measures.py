"""Profiles, planes and sharpness of exactly known losses; weights are restored exactly."""

import contextlib

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from eval.landscape import surface
from eval.landscape.surface import Weight, sharpness

RHO = 0.3


class Quadratic:
    """L(w) = w^T H w / 2 + b^T w + 3 in float64, as three terms.

    w consists of a (4, 3) matrix, whose filters are its rows, and a (2, 4) matrix, whose filters
    are its columns. H has eigenvalues of both signs unless ``is_convex``.
    """

    def __init__(self, seed, is_convex=False):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tensors = [normal(4, 3), normal(2, 4)]
        self.weights = [
            Weight("a", self.tensors[0], filter_dim=0),
            Weight("b", self.tensors[1], filter_dim=1),
            # The loss does not depend on this weight.
            Weight("unused", torch.zeros(1, 1, dtype=torch.float64)),
        ]
        root = normal(20, 20)
        self._H = root @ root.T if is_convex else root + root.T
        self._b = normal(20)

    def loss(self):
        w = torch.cat([tensor.flatten() for tensor in self.tensors])
        yield w @ self._H @ w / 2
        yield self._b @ w
        yield torch.tensor(3.0)

    @property
    def hessian(self):
        return self._H.numpy()

    def flat(self, parts):
        """Concatenate the parts of the two matrices, (20,), without that of the unused weight."""
        return np.concatenate([part.detach().numpy().ravel() for part in parts])[:20]

    def gradient(self):
        return self.hessian @ self.flat(self.tensors) + self._b.numpy()


def directions(weights):
    return surface.Direction(weights, 0, 0), surface.Direction(weights, 0, 1)


def test_each_filter_of_a_direction_has_the_norm_of_the_weights_filter():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    noise = torch.tensor([[1.0, 0.0], [5.0, 5.0], [3.0, -4.0]])
    rows = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.6, -0.8]])
    torch.testing.assert_close(surface.filter_normalized(noise, weight), rows)
    columns = surface.filter_normalized(noise, weight, filter_dim=1)
    # Squared column norms, by hand: 9.36 and 16.64 for the weight, 35 and 41 for the noise.
    expected = noise * torch.tensor([(9.36 / 35) ** 0.5, (16.64 / 41) ** 0.5])
    torch.testing.assert_close(columns, expected)
    kernel, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    direction = surface.filter_normalized(noise, kernel).flatten(1)  # one filter per output channel
    torch.testing.assert_close(direction.norm(dim=1), kernel.flatten(1).norm(dim=1))
    assert torch.cosine_similarity(direction, noise.flatten(1)).min() > 0.9999


def test_a_quadratics_profile_and_plane_have_the_curvature_of_its_hessian():
    problem = Quadratic(seed=4)
    both = directions(problem.weights)
    d = np.stack([problem.flat(direction) for direction in both])  # (2, 20)

    # A profile along d: L(w + t d) = L(w) + t g^T d + t^2 d^T H d / 2
    positions = surface.coordinates(0.5, 21)
    assert (positions[0], positions[10], positions[20]) == (-0.5, 0.0, 0.5)
    losses = surface.line(problem.weights, problem.loss, both[1], positions)
    fitted = np.polyfit(positions, losses, 2)
    assert 2 * fitted[0] == pytest.approx(d[1] @ problem.hessian @ d[1], rel=0.01)
    assert fitted[1] == pytest.approx(problem.gradient() @ d[1], rel=0.01)

    # A plane: second differences on a grid of 5 x 5 points with w in the middle
    positions = surface.coordinates(1.0, 5)
    grid = np.array(surface.plane(problem.weights, problem.loss, both, positions))
    step = positions[1] - positions[0]
    for axis, middle_line in ((0, grid[:, 2]), (1, grid[2, :])):
        curvature = (middle_line[3] - 2 * middle_line[2] + middle_line[1]) / step**2
        assert curvature == pytest.approx(d[axis] @ problem.hessian @ d[axis], rel=0.01)
    corners = grid[3, 3] - grid[3, 1] - grid[1, 3] + grid[1, 1]
    # The mixed derivative is d_0^T H d_1.
    assert corners / (4 * step**2) == pytest.approx(d[0] @ problem.hessian @ d[1], rel=0.01)
    assert losses[10] == grid[2, 2] == surface.evaluate(problem.loss)


@pytest.mark.parametrize("fails_at", [None, 2])
@pytest.mark.parametrize("kind", ["plane", "sharpness"])
def test_weights_and_flags_are_restored_bit_for_bit(kind, fails_at):
    dtype = torch.bfloat16 if kind == "plane" else torch.float32
    layer = nn.Linear(5, 3).requires_grad_(False).to(dtype)
    values, memory = layer.weight.clone(), layer.weight.data_ptr()
    calls = 0

    def loss():
        nonlocal calls
        if calls == fails_at:
            raise RuntimeError("out of memory")
        calls += 1
        yield layer(torch.ones(2, 5, dtype=dtype)).pow(2).sum()

    weights = [Weight("layer", layer.weight)]
    outcome = contextlib.nullcontext()
    if fails_at is not None:
        outcome = pytest.raises(RuntimeError, match="out of memory")
    with outcome:
        if kind == "plane":
            surface.plane(weights, loss, directions(weights), surface.coordinates(1.0, 3))
        else:
            sharpness(weights, loss, RHO)
    assert torch.equal(layer.weight, values)
    assert layer.weight.data_ptr() == memory
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("is_convex", [True, False])
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_a_quadratics_sharpness_agrees_with_scipy(is_convex, rho):
    """Sharpness is the maximum of L(w + e) - L(w) = g^T e + e^T H e / 2 over ||e|| <= rho."""
    problem = Quadratic(seed=5, is_convex=is_convex)
    gradient, H = problem.gradient(), problem.hessian

    def negative_rise(x):
        e = rho * x / max(1.0, float(np.linalg.norm(x)))  # maps all of R^20 onto the ball
        return -float(gradient @ e + e @ H @ e / 2)

    # BFGS finds a local maximum; the highest one from many starts is used as the maximum.
    starts = [gradient, *np.random.default_rng(0).normal(size=(12, 20))]
    highest = max(-minimize(negative_rise, x, method="BFGS").fun for x in starts)
    assert sharpness(problem.weights, problem.loss, rho, 150) == pytest.approx(highest, rel=1e-4)


def test_sharpness_finds_a_maximum_inside_the_ball_and_is_0_at_a_stationary_point():
    w = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    rise = sharpness([Weight("w", w)], lambda: [-(w**2).sum()], 5.0, steps=60)
    # The maximum of -||w||^2 is 0 and lies inside the ball; the ascent stays there.
    assert rise == pytest.approx(0.3**2 + 0.2**2, rel=1e-6)
    w = torch.zeros(1, 3, dtype=torch.float64)  # the gradient is 0 at a stationary point
    assert sharpness([Weight("w", w)], lambda: [(w**2).sum()], RHO) == 0
