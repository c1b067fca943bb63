"""What is compared, and when; tests/solvers/test_dependencies.py tries every way to write."""

import torch

from solvers.operators import memo
from tests.problems import kronecker_operator, low_rank_operator, updated_convolution_operator


def test_a_new_memo_begins_where_a_number_differs():
    W = kronecker_operator(2, 3)
    old = W.memo("law", object)
    assert W.T.memo("law", object) is old
    W.A[0, 0] = W.A[0, 0] + 2.0**-50
    assert W.T.memo("law", object) is not old
    assert W.memo("law", object) is not old


def test_a_number_that_returns_brings_no_memo_back():
    W = low_rank_operator(5, 2)
    old, before = W.memo("law", object), W.d.clone()
    W.d.mul_(2)
    W.memo("law", object)
    W.d.copy_(before)
    assert W.memo("law", object) is not old


def test_the_metric_counts_for_both_orientations():
    W = kronecker_operator(2, 3)
    dual = W.T.metric.clone()
    W.metric.mul_(4)
    torch.testing.assert_close(W.T.metric, dual / 4)
    torch.testing.assert_close(W.T.root_metric, (dual / 4).sqrt())


def test_a_part_that_changes_ends_what_the_whole_has():
    W = updated_convolution_operator()
    old = W.memo("law", object)
    W.base.kernel.mul_(0.5)
    assert W.memo("law", object) is not old


def test_within_a_solve_nothing_is_compared(monkeypatch):
    W = kronecker_operator(2, 3)
    looks = []
    same = memo.are_identical
    monkeypatch.setattr(memo, "are_identical", lambda a, b: looks.append(1) or same(a, b))
    with W.T.settled():
        count = len(looks)
        W.constants(), W.T.resolvent(0.3), W.diagonal()
        assert len(looks) == count
    W.constants()
    assert len(looks) == count + 1


def test_an_operator_takes_over_the_factors_of_an_equal_one():
    W, other = kronecker_operator(2, 3), kronecker_operator(2, 3)
    old = W.memo("law", object)
    other.T.adopt(W.T)
    assert other.memo("law", object) is old
    third = kronecker_operator(2, 3, seed=1)
    third.adopt(W)
    assert third.memo("law", object) is not old


def test_within_a_transform_nothing_is_stored():
    W = kronecker_operator(2, 3)

    def look(x):
        W.memo("law", object)
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    assert "law" not in W._memo
