"""Bounds of eigenvalues; tests/solvers/operators/test_low_rank.py has the hard cases."""

import math

import pytest
import torch

from solvers.operators.eigenvalue_bounds import DiagonalPlusLowRank


def draw(seed, n=8, r=2):
    g = torch.Generator().manual_seed(seed)
    D = torch.randn(n, generator=g, dtype=torch.float64)
    P, Q = torch.randn(2, n, r, generator=g, dtype=torch.float64)
    return D, P, Q


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_below_the_smallest_eigenvalue_and_near_it(seed):
    D, P, Q = draw(seed)
    matrix = torch.diag(D) + P @ Q.T + Q @ P.T
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    bound = DiagonalPlusLowRank.of(D, P, Q).smallest()
    assert bound <= smallest + 1e-13
    assert bound > smallest - 1e-6 * (1 + abs(smallest))


def test_without_low_rank_it_is_the_smallest_entry():
    D, P, Q = draw(0)
    bound = DiagonalPlusLowRank.of(D, 0 * P, 0 * Q).smallest()
    assert bound == pytest.approx(float(D.min()))
    assert bound <= float(D.min())


def test_what_is_not_so_is_not_proved():
    found = DiagonalPlusLowRank.of(*draw(1))
    smallest = found.smallest()
    assert found.exceeds(smallest - 1e-6)
    assert not found.exceeds(smallest + 1e-6)
    assert not found.exceeds(math.inf)
