import pytest
import torch

from solvers import DenseOperator, JacobiDeterminant
from solvers.methods.step_size import choose_step_size
from tests.problems import monotone_operator


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
