import pytest
import torch

from solvers import DenseOperator, Determinant, InverseGeometricMean, JacobiDeterminant
from solvers.methods.step_size import ForwardStep
from tests.problems import monotone_operator


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
