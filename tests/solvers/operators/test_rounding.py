"""Norms, and bounds of rounding against rational arithmetic: cancellation, extremes of range."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import (
    BlockTriangularOperator,
    ConvolutionOperator,
    DenseOperator,
    Inclusion,
    LowRankOperator,
    LowRankUpdate,
    ReLU,
)
from tests.problems import (
    block_triangular_operator,
    convolution_operator,
    kronecker_operator,
    low_rank_operator,
    monotone_operator,
    updated_convolution_operator,
)
from tests.solvers import exactly

MAKERS = {
    "dense": lambda dtype: monotone_operator(9, dtype=dtype),
    "transposed": lambda dtype: monotone_operator(9, dtype=dtype).T,
    "low rank": lambda dtype: low_rank_operator(9, 3, dtype=dtype),
    "block triangular": lambda dtype: block_triangular_operator(dtype=dtype),
    "convolution": lambda dtype: convolution_operator(2, 3, (4, 3), dtype=dtype),
    "of two products": lambda dtype: kronecker_operator(2, 4, dtype=dtype),
    "updated": lambda dtype: updated_convolution_operator(dtype=dtype),
}


def errors(operator, z, product):
    """The squared Λ norm of product − Wz, exactly, per sample, for a product of the operator."""
    W = exactly.rows(exactly.dense(operator))
    (metric,) = exactly.rows(operator.metric[None])
    return [
        exactly.square(metric, [a - b for a, b in zip(y, exactly.product(W, x), strict=True)])
        for x, y in zip(exactly.rows(z), exactly.rows(product), strict=True)
    ]


@pytest.mark.parametrize("n", [128, 500])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_accumulator_may_start_with_the_bias(n, batch, transposed, sign):
    # z = 1 is a fixed point of what addmm computes where it starts its accumulators with v = 1:
    # every product is lost. The exact solution is 1 / (1 − nδ).
    delta = sign * 0.24 * torch.finfo(torch.float64).eps
    W = torch.full((n, n), delta, dtype=torch.float64)
    W = W.T.contiguous().T if transposed else W
    v = torch.ones(batch, n, dtype=torch.float64)
    bound = Inclusion(DenseOperator(W), v, ReLU()).error_bound(torch.ones_like(v))
    true = (1 / (1 - n * Fraction(delta)) - 1) ** 2 * n
    assert all(exactly.at_most(true, float(b)) for b in bound)
    assert float(bound.max()) < 40 * float(true) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MAKERS)
def test_products_keep_to_their_bound(kind, dtype):
    operator = MAKERS[kind](dtype)
    g = torch.Generator().manual_seed(3)
    for scale in (0, 20):
        z = torch.randn(5, operator.n, dtype=dtype, generator=g)
        z = z * 2.0 ** torch.randint(-scale, scale + 1, z.shape, generator=g)
        bound = operator.rounding(z)
        assert bound.dtype == torch.float64
        product = operator.mv(z)
        for true, b in zip(errors(operator, z, product), bound.tolist(), strict=True):
            assert exactly.at_most(true, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("flush", [False, True])
def test_bounds_do_not_vanish_by_underflow(kind, dtype, flush):
    operator, finfo = MAKERS[kind](dtype), torch.finfo(dtype)
    z = torch.rand(3, operator.n, dtype=dtype, generator=torch.Generator().manual_seed(4)) + 0.5
    torch.set_flush_denormal(flush)
    try:
        for size in (finfo.tiny, 8 * finfo.tiny, finfo.smallest_normal**0.5):
            small = z * size
            product, bound = operator.mv(small), operator.rounding(small)
            torch.set_flush_denormal(False)
            for true, b in zip(errors(operator, small, product), bound.tolist(), strict=True):
                assert b > 0
                assert exactly.at_most(true, b)
            torch.set_flush_denormal(flush)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", MAKERS)
def test_bounds_that_overflow_are_infinite(kind):
    operator = MAKERS[kind](torch.float64)
    z = torch.full((2, operator.n), 1.7e308, dtype=torch.float64)
    assert (operator.rounding(z) > 1e290).all()  # finite or not, never NaN or 0
    problem = Inclusion(operator, z, ReLU())
    assert (problem.error_bound(z) == torch.inf).all()


def test_what_a_factor_makes_of_underflow_is_counted():
    # zB is lost, and A would have made it 1e300 times as large.
    tiny = torch.finfo(torch.float64).tiny
    B = torch.full((3, 1), tiny, dtype=torch.float64)
    A = torch.full((3, 1), 1e300, dtype=torch.float64)
    operator = LowRankOperator(torch.zeros(3, dtype=torch.float64), A, B)
    z = torch.full((1, 3), 2.0**-60, dtype=torch.float64)
    (true,) = errors(operator, z, operator.mv(z))
    assert true > 0
    assert exactly.at_most(true, float(operator.rounding(z)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 64]), st.booleans(), st.integers(0, 500))
def test_error_bounds_hold_for_entries_of_all_sizes(seed, batch, transposed, spread):
    g = torch.Generator().manual_seed(seed)
    n = 6

    def draw(*shape):
        exponents = torch.randint(-spread, spread + 1, shape, generator=g)
        return torch.randn(*shape, generator=g, dtype=torch.float64) * exponents.double().exp2()

    # A skew part of any size leaves m at least as it is.
    W = torch.triu(draw(n, n), 1)
    W = W - W.T - 0.5 * torch.eye(n, dtype=torch.float64)
    operator = DenseOperator(W).T if transposed else DenseOperator(W)
    z = draw(batch, n).abs()
    # v makes z the exact solution of the rounded problem, nearly: big terms cancel.
    v = z - z @ operator.W.T
    problem = Inclusion(operator, v, ReLU())
    bound = problem.error_bound(z)
    assert not bound.isnan().any()
    exact_W = exactly.rows(operator.W)
    (metric,) = exactly.rows(operator.metric[None])
    for x, b, row in zip(exactly.rows(z), bound.tolist(), exactly.rows(v), strict=True):
        image = exactly.image(exact_W, row, x)
        # ‖z − z*‖ ≥ ‖z̃ − z‖ / (1 + ‖W‖ + 1): a bound below that is wrong.
        gap = exactly.square(metric, [a - c for a, c in zip(image, x, strict=True)])
        size = sum(abs(w) for row_W in exact_W for w in row_W)
        assert b == float("inf") or gap <= (Fraction(b) * (2 + size)) ** 2


def test_norm_survives_extreme_scales():
    W = monotone_operator(4, dtype=torch.float32, identity_metric=True)
    assert W.norm(torch.full((1, 4), 1e-30)).item() == pytest.approx(2e-30, rel=1e-5)
    assert W.norm(torch.full((1, 4), 1e30)).item() == pytest.approx(2e30, rel=1e-5)
    assert W.norm(torch.zeros(1, 4)).item() == 0


def _denormal_operators(dtype):
    """Operators of which some entries, or what z meets, are denormal; by factors of two."""
    tiny = torch.finfo(dtype).tiny
    small, large = tiny / 8, 2.0 ** (60 if dtype == torch.float32 else 400)
    W = torch.tensor([[0.0, small, 0.0], [0.0, 0.0, large], [0.0, 0.0, 0.0]], dtype=dtype)
    d = torch.tensor([small, 0.0, 0.0], dtype=dtype)
    A = torch.tensor([[small], [0.0], [large]], dtype=dtype)
    B = torch.tensor([[small], [1.0], [0.0]], dtype=dtype)
    low = LowRankOperator(d, A, B)
    kernel = torch.zeros(1, 1, 3, 3, dtype=dtype)
    kernel[0, 0, 1] = torch.tensor([small, 0.0, large], dtype=dtype)
    convolution = ConvolutionOperator(kernel, (3, 3))
    wide = torch.zeros(9, 1, dtype=dtype)
    wide[0] = large
    return [
        DenseOperator(W),
        low,
        convolution,
        LowRankUpdate(convolution, wide, wide * 2.0**-120),
        BlockTriangularOperator((DenseOperator(W), low), {(1, 0): W}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", range(5))
def test_rounding_covers_operands_that_are_read_as_zero(kind, dtype):
    finfo = torch.finfo(dtype)
    first = _denormal_operators(dtype)[kind]
    for operator in (first, first.T):
        W = exactly.rows(exactly.dense(operator))
        for size in (finfo.tiny / 4, 2.0 ** (20 if dtype == torch.float32 else 100)):
            z = torch.full((1, operator.n), size, dtype=dtype)
            (exact_z,) = exactly.rows(z)
            torch.set_flush_denormal(True)
            try:
                product, bound = operator.mv(z), operator.rounding(z)
            finally:
                torch.set_flush_denormal(False)
            (found,) = exactly.rows(product)
            missed = [a - b for a, b in zip(found, exactly.product(W, exact_z), strict=True)]
            assert exactly.at_most(sum(a * a for a in missed), float(bound))
