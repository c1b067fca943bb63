import pytest
import torch

from solvers import BlockTriangularOperator, DenseOperator, NotMonotoneError, ZeroOperator
from solvers.testing import written_out
from tests.problems import block_triangular_operator


def test_every_block_stands_where_it_was_put():
    W = block_triangular_operator()
    matrix, units = written_out(W), W.layout.units
    for i, block in enumerate(W.blocks):
        torch.testing.assert_close(matrix[units[i], units[i]], written_out(block))
        for j in range(len(units)):
            if i != j:
                expected = W.couplings.get((i, j), torch.zeros(()).double())
                found = matrix[units[i], units[j]]
                torch.testing.assert_close(found, expected.expand_as(found))


def test_its_own_metric_makes_the_whole_monotone():
    plain = block_triangular_operator()
    assert plain.constants().m < 0
    assert plain.is_monotone()  # block by block
    assert block_triangular_operator(monotone=True).constants().m > 0
    torch.testing.assert_close(plain.T.monotone_metric(), 1 / plain.monotone_metric())


def test_a_block_that_is_not_monotone_is_named():
    W = BlockTriangularOperator([ZeroOperator(torch.ones(2)), DenseOperator(2 * torch.eye(2))], {})
    assert not W.is_monotone()
    with pytest.raises(NotMonotoneError, match="block 1 is not strongly monotone"):
        W.monotone_metric()


@pytest.mark.parametrize(("blocks", "couplings", "error", "message"), [
    ([], {}, ValueError, "at least one block"),
    ([torch.eye(2)], {}, TypeError, r"block 0 must be a LinearOperator.*DenseOperator\(W\)"),
    ([ZeroOperator(torch.ones(2))] * 2, {(0, 1): torch.eye(2)}, ValueError, "0 ≤ j < i < 2"),
    ([ZeroOperator(torch.ones(2))] * 2, {(1, 0): torch.ones(3, 2)}, ValueError, r"shape \(2, 2\)"),
    ([ZeroOperator(torch.ones(2)), ZeroOperator(torch.ones(2).double())], {}, ValueError,
     "block 1 is torch.float64"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(blocks, couplings, error, message):
    with pytest.raises(error, match=message):
        BlockTriangularOperator(blocks, couplings)
