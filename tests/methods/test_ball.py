"""ball: the norm by Gram matrices, and the projection of Eq. 10."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion.adapters import Factors
from bilora_diffusion.methods.bilora import ball

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def true_norm(factors):
    """Every product formed in float64."""
    squares = [(f.scale * (f.B.double() @ f.A.double())).square().sum() for f in factors]
    return math.sqrt(math.fsum(float(square) for square in squares))


def random_factors(shapes, scales, dtypes, seed, sizes=(1.0, 1.0)):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, columns, size, dtype):
        values = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * size
        return values.to(dtype)

    return [
        Factors(str(i), draw(r, n, sizes[0], dtype), draw(m, r, sizes[1], dtype), scale)
        for i, ((m, n, r), scale, dtype) in enumerate(zip(shapes, scales, dtypes, strict=True))
    ]


@st.composite
def many_factors(draw):
    """Layers of mixed shapes, ranks, scales, sizes and precisions; some repeated."""
    dimension = st.integers(1, 40)
    kinds = draw(st.lists(st.tuples(dimension, dimension, st.integers(1, 9)), min_size=1))
    shapes = [kind for kind in kinds for _ in range(draw(st.integers(1, 3)))]
    scales = draw(
        st.lists(
            st.sampled_from([0.01, 0.5, 1.0, 2.0, 3.7, 64.0]),
            min_size=len(shapes),
            max_size=len(shapes),
        )
    )
    common = draw(st.sampled_from([*DTYPES, None]))
    dtypes = [common or draw(st.sampled_from(DTYPES)) for _ in shapes]
    sizes = draw(st.tuples(st.sampled_from([1e-4, 0.1, 1.0, 30.0]), st.sampled_from([1e-4, 1.0])))
    return random_factors(shapes, scales, dtypes, draw(st.integers(0, 10**6)), sizes)


@settings(max_examples=150)
@given(factors=many_factors(), rho=st.floats(1e-3, 100, allow_nan=False), scaled=st.booleans())
def test_the_norm_is_within_rho_after_projection(factors, rho, scaled):
    copies = copy.deepcopy(factors)
    if not scaled:
        factors = [f._replace(scale=1.0) for f in factors]
    c = true_norm(factors)
    norm = ball.frobenius_norm(factors)
    assert (norm.shape, norm.dtype) == ((), torch.float64)
    assert float(norm) == pytest.approx(c, rel=1e-9, abs=1e-12)
    result = ball.project_(factors, rho)
    assert float(result.before) == pytest.approx(c, rel=1e-9, abs=1e-12)
    assert true_norm(factors) <= rho * (1 + 1e-6)
    assert float(result.after) <= rho * (1 + 1e-9)
    if c <= rho * (1 - 1e-9):
        for new, old in zip(factors, copies, strict=True):
            assert torch.equal(new.A, old.A)
            assert torch.equal(new.B, old.B)
        assert float(result.after) == float(result.before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cancel", [1e-1, 1e-2, 1e-3])
def test_bound_holds_where_columns_cancel(dtype, cancel):
    """B @ A far smaller than B and A: rounding the factors weighs more, and the bound knows it."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        b, a, direction = (
            torch.randn(30, dtype=torch.float64, generator=generator) for _ in range(3)
        )
        A, B = torch.stack((a, a + cancel * direction)), torch.stack((b, -b), dim=1)
        factors = [Factors("0", A.to(dtype), B.to(dtype), 1.0)]
        rho = true_norm(factors) / 3
        ball.project_(factors, rho)
        assert true_norm(factors) <= rho * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_projection_reaches_the_sphere_by_one_root_for_both_factors_and_once(dtype, low):
    factors = random_factors([(30, 20, 4)] * 3 + [(8, 50, 2)], [2.0] * 3 + [0.5], [dtype] * 4, 1)
    old = copy.deepcopy(factors)
    before = true_norm(factors)
    result = ball.project_(factors, 0.05)
    assert float(result.before) == pytest.approx(before, rel=1e-12)
    assert true_norm(factors) >= 0.05 * (1 - low)
    assert float(result.after) == pytest.approx(true_norm(factors), rel=2 * low)
    root = math.sqrt(0.05 / before)
    for new, was in zip(factors, old, strict=True):
        torch.testing.assert_close(new.A, root * was.A, rtol=low, atol=0)
        torch.testing.assert_close(new.B, root * was.B, rtol=low, atol=0)
    projected_once = copy.deepcopy(factors)
    ball.project_(factors, 0.05)
    if dtype == torch.float32:
        assert all(torch.equal(f.A, was.A) for f, was in zip(factors, projected_once, strict=True))


def test_zero_factors_and_no_factors():
    factors = [Factors("0", torch.randn(2, 3), torch.zeros(4, 2), 1.0)]
    initial_A = factors[0].A.clone()
    assert float(ball.frobenius_norm(factors)) == 0
    assert [float(value) for value in ball.project_(factors, 0.1)] == [0, 0, 1]
    assert torch.equal(factors[0].A, initial_A)
    for call in (ball.frobenius_norm, lambda factors: ball.project_(factors, 1.0)):
        with pytest.raises(ValueError, match="no factors"):
            call([])


def test_large_groups_are_measured_in_pieces(monkeypatch):
    factors = random_factors([(6, 5, 2)] * 7, [1.5] * 7, [torch.float32] * 7, seed=4)
    unsplit_norm = float(ball.frobenius_norm(factors))
    monkeypatch.setattr(ball, "_STACK_ELEMENTS_ON_CPU", 50)
    assert float(ball.frobenius_norm(factors)) == pytest.approx(unsplit_norm, rel=1e-12)
