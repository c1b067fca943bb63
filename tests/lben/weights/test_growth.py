"""Bounds of growth are upper bounds in exact arithmetic, and infinite rather than wrong."""

import math
from fractions import Fraction

import pytest
import torch

from lben.weights.growth import (
    Growth,
    absolute_norm,
    add_up,
    largest_up,
    norm_up,
    norms_up,
    not_nan,
    times_up,
    underflow,
)

NUMBERS = [0.0, 5e-324, 1e-310, 1e-200, 0.1, 1 / 3, 1.0, 7e150, 1e300]


def test_sums_and_products_are_rounded_upwards():
    for a in NUMBERS:
        for b in NUMBERS:
            assert Fraction(add_up(a, b)) >= Fraction(a) + Fraction(b)
            found = times_up(a, b)
            assert found == math.inf or Fraction(found) >= Fraction(a) * Fraction(b)
    assert times_up(0.0, math.inf) == times_up(math.nan, 1.0) == math.inf
    assert add_up(1.0, math.nan) == math.inf


def test_growth_composes_as_affine_functions_do():
    inner, outer = Growth(1.0, 3.0, 100.0), Growth(0.5, 2.0, 31.0)
    both = outer.after(inner)
    for size in (0.0, 1.0, 9.0):
        exact = 0.5 + 2.0 * (1.0 + 3.0 * size)
        assert exact <= float(both.at(torch.tensor(size))) <= exact * (1 + 1e-9)
    assert both.limit == pytest.approx(10.0)
    assert float(both.at(torch.tensor(10.1))) == math.inf
    total = inner + outer
    assert (total.constant, total.slope) == pytest.approx((1.5, 5.0))
    assert total.limit == 31.0
    assert inner.times(2.0).plus(1.0).constant == pytest.approx(3.0)
    assert Growth(5.0, 1.0).reach(4.0) == -math.inf


def test_norms_are_above_the_exact_ones():
    for scale in (1e-320, 1e-160, 1.0, 1e154, 1e300):
        x = scale * torch.rand(4, 9, dtype=torch.float64)
        for row, found in zip(x.tolist(), norms_up(x, 1).tolist(), strict=True):
            assert sum(Fraction(v) ** 2 for v in row) <= Fraction(found) ** 2
        assert norm_up(x) >= float(norms_up(x, 1).max())
        assert largest_up(x) >= float(x.max())
    assert norms_up(torch.tensor([math.nan]), 1) == math.inf
    assert largest_up(torch.zeros(0)) == 0.0


def test_a_matrix_of_absolute_values_is_bounded():
    U = torch.randn(5, 4, dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(U.abs(), 2))
    assert exact <= absolute_norm(U) <= 1.5 * exact


def test_what_underflows_is_counted():
    tiny = torch.finfo(torch.float64).tiny
    a, b = torch.full((1, 3), 0.9 * tiny, dtype=torch.float64), torch.tensor([[1.0]]).double()
    lost = underflow(3, a, b)
    assert lost.shape == (1, 1)
    assert float(lost) > 3 * tiny * float(a[0, 0])  # three products that vanish
    assert not_nan(torch.tensor([math.nan, 1.0])).tolist() == [math.inf, 1.0]
