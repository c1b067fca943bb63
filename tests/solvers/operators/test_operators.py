import pytest
import torch

from solvers import (
    BlockTriangularOperator,
    ConvolutionOperator,
    DenseOperator,
    Determinant,
    InverseGeometricMean,
    JacobiDeterminant,
    LowRankOperator,
)
from solvers.methods.step_size import ForwardStep, choose_step_size
from solvers.operators import LowRankUpdate
from solvers.operators.matrix import is_finite
from tests.problems import monotone_operator
from tests.solvers import exactly


def test_transposed_resolvent_reuses_the_factor(monkeypatch):
    W = monotone_operator(6)
    alpha = choose_step_size(JacobiDeterminant(), W)
    W.resolvent(alpha)
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda A: pytest.fail("factored twice"))
    monkeypatch.setattr(torch.linalg, "slogdet", lambda A: pytest.fail("determinant twice"))
    reused = W.T.resolvent(choose_step_size(JacobiDeterminant(), W.T))
    x = torch.randn(4, 6, dtype=torch.float64)
    z = reused.solve(x)
    torch.testing.assert_close(z + alpha * (z - W.T.mv(z)), x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_constants_bound_the_operator_and_are_attained(seed, transposed):
    W = monotone_operator(7, seed=seed)
    W = W.T if transposed else W
    c = W.constants()
    z = torch.randn(20000, 7, dtype=torch.float64)
    Az = z - W.mv(z)
    inner = (W.metric * Az * z).sum(-1) / W.norm(z) ** 2
    gain = W.norm(Az) / W.norm(z)
    assert c.m <= inner.min()
    assert inner.min() < c.m + 0.25 * (inner.max() - c.m)
    assert gain.max() <= c.L
    assert gain.max() > 0.8 * c.L
    assert c.m >= 0.3 - 1e-9


@pytest.mark.parametrize(("numbers", "finite"), [
    ([1.0, -2.0], True), ([3e38, 3e38], True), ([torch.inf, -torch.inf], False),
    ([torch.nan, 1.0], False), ([-torch.inf, 3e38], False),
])  # fmt: skip
def test_sums_that_overflow_are_no_evidence(numbers, finite):
    assert is_finite(torch.tensor(numbers)) == finite


def test_norm_survives_extreme_scales():
    W = monotone_operator(4, dtype=torch.float32, identity_metric=True)
    assert W.norm(torch.full((1, 4), 1e-30)).item() == pytest.approx(2e-30, rel=1e-5)
    assert W.norm(torch.full((1, 4), 1e30)).item() == pytest.approx(2e30, rel=1e-5)
    assert W.norm(torch.zeros(1, 4)).item() == 0


def test_determinant_rule_is_the_inverse_geometric_mean_of_eigenvalues():
    W = monotone_operator(9)
    A = torch.eye(9, dtype=torch.float64) - W.W
    expected = torch.linalg.eigvals(A).abs().log().mean().exp().reciprocal()
    assert Determinant()(W) == pytest.approx(float(expected))
    assert Determinant()(W.T) == pytest.approx(float(expected))


def test_jacobi_determinant_is_the_determinant_rule_of_the_scaled_problem():
    W = monotone_operator(9)
    A = torch.eye(9, dtype=torch.float64) - W.W
    scaled = A / A.diagonal()[:, None]
    delta = float(torch.linalg.det(scaled).abs()) ** (-1 / 9)
    torch.testing.assert_close(JacobiDeterminant()(W), delta / A.diagonal())


@pytest.mark.parametrize("rule", [InverseGeometricMean(), ForwardStep()], ids=repr)
def test_rules_that_need_monotonicity_say_so(rule):
    with pytest.raises(ValueError, match="needs a strongly monotone I − W, but m = -1"):
        rule(DenseOperator(2 * torch.eye(3, dtype=torch.float64)))


def test_jacobi_rule_refuses_a_non_monotone_diagonal():
    with pytest.raises(ValueError, match="1 − Wᵢᵢ must be positive"):
        JacobiDeterminant()(DenseOperator(2 * torch.eye(3)))


def test_singular_resolvent_is_an_error():
    with pytest.raises(ValueError, match="singular or not finite"):
        DenseOperator(2 * torch.eye(3)).resolvent(1.0)


@pytest.mark.parametrize(
    ("W", "metric", "message"),
    [
        (torch.zeros(2, 3), None, r"square matrix, got shape \(2, 3\)"),
        (torch.zeros(0, 0), None, r"square matrix, got shape \(0, 0\)"),
        (torch.zeros(2, 2), torch.ones(3), r"shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 2), torch.ones(2, dtype=torch.float64), "metric is torch.float64"),
    ],
)
def test_bad_operators_are_refused(W, metric, message):
    with pytest.raises(ValueError, match=message):
        DenseOperator(W, metric)


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
