"""The auxiliary's norm from Gram matrices, and its projection onto the ball (Eq. 10)."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion.adapters import Factors
from bilora_diffusion.adapters import precision as stacks
from bilora_diffusion.methods.bilora import ball

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def true_norm(factors):
    """Return the norm of the explicit products, in float64."""
    norms = [float((f.scale * (f.B.double() @ f.A.double())).norm()) for f in factors]
    return math.hypot(*norms)


def random_factors(shape, generator, scale=1.0, dtype=torch.float32, A_size=1.0, B_size=1.0):
    """Return normal factors with deviations A_size and B_size; the shape is (out, in, rank)."""
    rows, columns, rank = shape
    A = A_size * torch.randn(rank, columns, dtype=torch.float64, generator=generator)
    B = B_size * torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    return Factors("a layer", A.to(dtype), B.to(dtype), scale)


@st.composite
def many_factors(draw):
    """Draw layers of mixed shapes, ranks, scales, sizes and precisions; some share a shape."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dimension = st.integers(1, 40)
    common_dtype = draw(st.sampled_from([*DTYPES, None]))
    A_size = draw(st.sampled_from([1e-4, 0.1, 1.0, 30.0]))
    B_size = draw(st.sampled_from([1e-4, 1.0]))
    factors = []
    for shape in draw(st.lists(st.tuples(dimension, dimension, st.integers(1, 9)), min_size=1)):
        for _ in range(draw(st.integers(1, 3))):
            scale = draw(st.sampled_from([0.01, 0.5, 1.0, 2.0, 3.7, 64.0]))
            dtype = common_dtype or draw(st.sampled_from(DTYPES))
            factors.append(random_factors(shape, generator, scale, dtype, A_size, B_size))
    return factors


@settings(max_examples=150)
@given(factors=many_factors(), rho=st.floats(1e-3, 100, allow_nan=False), scaled=st.booleans())
def test_the_norm_is_within_rho_after_projection(factors, rho, scaled):
    if not scaled:
        factors = [layer._replace(scale=1.0) for layer in factors]
    initial_factors = copy.deepcopy(factors)
    expected_norm = true_norm(factors)
    norm = ball.frobenius_norm(factors)
    assert (norm.shape, norm.dtype) == ((), torch.float64)
    assert float(norm) == pytest.approx(expected_norm, rel=1e-9, abs=1e-12)
    projection = ball.project_(factors, rho)
    assert float(projection.before) == pytest.approx(expected_norm, rel=1e-9, abs=1e-12)
    # Rounding to the factors' precision must not move them out of the ball.
    assert true_norm(factors) <= rho * (1 + 1e-6)
    assert float(projection.after) <= rho * (1 + 1e-9)
    if expected_norm <= rho * (1 - 1e-9):  # inside the ball nothing changes
        for layer, initial_layer in zip(factors, initial_factors, strict=True):
            assert torch.equal(layer.A, initial_layer.A)
            assert torch.equal(layer.B, initial_layer.B)
        assert float(projection.after) == float(projection.before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cancel", [1e-1, 1e-2, 1e-3])
def test_the_bound_holds_when_columns_cancel(dtype, cancel):
    """If B @ A is far smaller than B and A, rounding errors of the factors matter more."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        b, a, direction = torch.randn(3, 30, dtype=torch.float64, generator=generator)
        # b a^T - b (a + cancel * direction)^T = -cancel * b direction^T
        A = torch.stack((a, a + cancel * direction))
        B = torch.stack((b, -b), dim=1)
        factors = [Factors("0", A.to(dtype), B.to(dtype), 1.0)]
        # Far outside the ball, so the projection rounds the factors again.
        rho = true_norm(factors) / 3
        ball.project_(factors, rho)
        assert true_norm(factors) <= rho * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_projection_scales_both_factors_equally_to_the_sphere_and_is_idempotent(dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    factors = [random_factors((30, 20, 4), generator, 2.0, dtype) for _ in range(3)]
    factors.append(random_factors((8, 50, 2), generator, 0.5, dtype))
    initial_factors = copy.deepcopy(factors)
    initial_norm = true_norm(factors)
    projection = ball.project_(factors, 0.05)
    assert float(projection.before) == pytest.approx(initial_norm, rel=1e-12)
    assert true_norm(factors) >= 0.05 * (1 - tolerance)
    assert float(projection.after) == pytest.approx(true_norm(factors), rel=2 * tolerance)
    # The product shrinks by rho / norm, and each factor by the square root of it.
    root = math.sqrt(0.05 / initial_norm)
    for layer, initial_layer in zip(factors, initial_factors, strict=True):
        torch.testing.assert_close(layer.A, root * initial_layer.A, rtol=tolerance, atol=0)
        torch.testing.assert_close(layer.B, root * initial_layer.B, rtol=tolerance, atol=0)
    if dtype == torch.float32:
        projected_once = copy.deepcopy(factors)
        ball.project_(factors, 0.05)
        for layer, projected_layer in zip(factors, projected_once, strict=True):
            # Rounding leaves the norm at rho or below, so a second projection changes nothing.
            assert torch.equal(layer.A, projected_layer.A)


def test_zero_factors_have_norm_zero_and_no_factors_are_an_error():
    factors = [Factors("0", torch.randn(2, 3), torch.zeros(4, 2), 1.0)]
    initial_A = factors[0].A.clone()
    assert float(ball.frobenius_norm(factors)) == 0
    assert [float(value) for value in ball.project_(factors, 0.1)] == [0, 0, 1]
    assert torch.equal(factors[0].A, initial_A)
    with pytest.raises(ValueError, match="no factors"):
        ball.frobenius_norm([])
    with pytest.raises(ValueError, match="no factors"):
        ball.project_([], 1.0)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])  # float32 on MPS
def test_a_radius_of_0_sets_the_factors_to_zero(precision, monkeypatch):
    monkeypatch.setattr(stacks, "exact_dtype", lambda _: precision)
    factors = [Factors("0", torch.randn(2, 3), torch.randn(4, 2), 1.0)]
    ball.project_(factors, 0.0)
    assert not factors[0].A.any()
    assert not factors[0].B.any()


def test_the_norm_of_a_large_group_is_computed_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    factors = [random_factors((6, 5, 2), generator, 1.5) for _ in range(7)]
    unsplit_norm = float(ball.frobenius_norm(factors))
    monkeypatch.setattr(ball, "_STACK_ELEMENTS_ON_CPU", 50)
    assert float(ball.frobenius_norm(factors)) == pytest.approx(unsplit_norm, rel=1e-12)
