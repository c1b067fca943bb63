import pytest
import torch

from solvers import DenseOperator, LowRankUpdate
from solvers.testing import written_out
from tests.problems import updated_convolution_operator


def test_constants_are_bounds_of_a_sum():
    W = updated_convolution_operator()
    own = W.constants()
    exact = DenseOperator(written_out(W), W.metric).constants()
    assert own.m <= exact.m
    assert exact.L <= own.L <= W.base.constants().L + 10 * exact.L


def test_a_core_without_an_inverse_is_refused():
    W = updated_convolution_operator()
    # With base K∗ and A = (I − K∗)b, Bᵀb = 1 the matrix I − W maps b to 0.
    b = torch.ones(W.n, 1, dtype=torch.float64) / W.n**0.5
    A = b - W.base.mv(b.T).T
    assert LowRankUpdate(W.base, A, b).log_determinant() < -25


@pytest.mark.parametrize("rows", [3, 24])
def test_factors_must_fit_the_convolution(rows):
    W = updated_convolution_operator()
    wrong = torch.ones(rows, 2 if rows != W.n else 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"A and B must have shape \(24, r\)"):
        LowRankUpdate(W.base, wrong, W.B)
    with pytest.raises(TypeError, match="base must be a ConvolutionOperator"):
        LowRankUpdate(DenseOperator(torch.eye(3)), W.A, W.B)
