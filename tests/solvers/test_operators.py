import pytest
import torch

from solvers import DenseOperator, Determinant, InverseGeometricMean, JacobiDeterminant
from solvers.step_size import ForwardStep, resolve
from tests.problems import monotone_operator


def test_transposed_resolvent_reuses_the_factor(monkeypatch):
    W = monotone_operator(6)
    alpha = resolve(JacobiDeterminant(), W)
    W.resolvent(alpha)
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda A: pytest.fail("factored twice"))
    monkeypatch.setattr(torch.linalg, "slogdet", lambda A: pytest.fail("determinant twice"))
    reused = W.T.resolvent(resolve(JacobiDeterminant(), W.T))
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
