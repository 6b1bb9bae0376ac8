"""Directions, profiles and planes on functions that are known exactly, and exact restoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.landscape.sharpness import sharpness, top_eigenvalue
from eval.landscape.weights import (
    Direction,
    Weight,
    coordinates,
    evaluate,
    filter_normalized,
    line,
    loss_and_gradient,
    plane,
)
from tests.eval.landscapes import Quadratic


def test_each_filter_gets_the_norm_of_its_weight_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    noise = torch.tensor([[1.0, 0.0], [5.0, 5.0], [3.0, -4.0]])
    rows = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.6, -0.8]])
    torch.testing.assert_close(filter_normalized(noise, weight), rows)
    columns = filter_normalized(noise, weight, filter_dim=1)
    # Squared norms of the columns by hand: 9.36 and 16.64 of the weight, 35 and 41 of the noise.
    wanted = noise * torch.tensor([(9.36 / 35) ** 0.5, (16.64 / 41) ** 0.5])
    torch.testing.assert_close(columns, wanted)

    kernel, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    found = filter_normalized(noise, kernel).flatten(1)  # an output channel is a filter
    torch.testing.assert_close(found.norm(dim=1), kernel.flatten(1).norm(dim=1))
    assert torch.cosine_similarity(found, noise.flatten(1)).min() > 0.9999


def test_a_quadratics_profile_has_the_curvature_of_its_hessian() -> None:
    number = 1
    problem = Quadratic(seed=number)
    direction = Direction(problem.weights, 0, number)
    positions = coordinates(0.5, 21)
    assert (positions[0], positions[10], positions[20]) == (-0.5, 0.0, 0.5)
    losses = line(problem.weights, problem.loss, direction, positions)
    fitted = np.polyfit(positions, losses, 2)
    d = problem.flat(direction)
    assert 2 * fitted[0] == pytest.approx(d @ problem.hessian @ d, rel=0.01)
    assert fitted[1] == pytest.approx(problem.gradient() @ d, rel=0.01)
    assert losses[10] == evaluate(problem.loss)


def test_a_quadratics_plane_has_the_curvature_of_its_hessian() -> None:
    problem = Quadratic(seed=4)
    first, second = Direction(problem.weights, 0, 0), Direction(problem.weights, 0, 1)
    positions = coordinates(1.0, 5)
    found = np.array(plane(problem.weights, problem.loss, (first, second), positions))
    d = np.stack([problem.flat(first), problem.flat(second)])
    step, centre = positions[1] - positions[0], found[2, 2]
    for axis, column in ((0, found[:, 2]), (1, found[2, :])):
        curvature = (column[3] - 2 * column[2] + column[1]) / step**2
        assert curvature == pytest.approx(d[axis] @ problem.hessian @ d[axis], rel=0.01)
    corners = found[3, 3] - found[3, 1] - found[1, 3] + found[1, 1]
    assert corners / (4 * step**2) == pytest.approx(d[0] @ problem.hessian @ d[1], rel=0.01)
    assert centre == evaluate(problem.loss)


def _directions(weights: Sequence[Weight]) -> tuple[Direction, Direction]:
    return Direction(weights, 0, 0), Direction(weights, 0, 1)


@pytest.mark.parametrize("fails_at", [None, 2])
@pytest.mark.parametrize(
    ("look", "dtype"),
    [
        (lambda w, f: line(w, f, _directions(w)[0], coordinates(1.0, 5)), torch.bfloat16),
        (lambda w, f: plane(w, f, _directions(w), coordinates(1.0, 3)), torch.bfloat16),
        (lambda w, f: sharpness(w, f, 0.3), torch.float32),
        (top_eigenvalue, torch.float32),
    ],
    ids=["line", "plane", "sharpness", "eigenvalue"],
)
def test_weights_and_flags_are_restored_bit_for_bit(
    look: Callable[..., object], dtype: torch.dtype, fails_at: int | None
) -> None:
    layer = nn.Linear(5, 3).requires_grad_(False).to(dtype)
    before, memory, calls = layer.weight.clone(), layer.weight.data_ptr(), 0

    def loss() -> Tensor:
        nonlocal calls
        if calls == fails_at:
            raise RuntimeError("out of memory")
        calls += 1
        return layer(torch.ones(2, 5, dtype=dtype)).pow(2).sum()

    weights = [Weight("layer", layer.weight)]
    if fails_at is None:
        look(weights, loss)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            look(weights, loss)
    assert torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == memory
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


def test_a_loss_in_terms_is_their_sum_and_so_is_its_gradient() -> None:
    layer = nn.Linear(3, 2).double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    weights = [Weight("w", layer.weight), Weight("unused", nn.Parameter(torch.ones(2, 2)))]

    def whole() -> Tensor:
        return layer(inputs).pow(2).mean()

    def parts():
        for row in inputs:
            yield layer(row).pow(2).mean() / len(inputs)
        yield torch.zeros(())  # a constant

    (a, slope_a), (b, slope_b) = (loss_and_gradient(f, weights) for f in (whole, parts))
    assert a == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(slope_a, slope_b)
    assert torch.equal(slope_a[1], torch.zeros(2, 2))
    assert layer.weight.grad is None
