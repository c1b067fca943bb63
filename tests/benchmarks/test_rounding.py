"""The reference of the rounding benchmark is exact, and a bound that is too small is counted."""

from fractions import Fraction

import pytest
import torch

from benchmarks import rounding
from benchmarks.dyadic import BITS, Dyadic
from benchmarks.networks import KINDS


def fractions(x):
    return [Fraction(2) ** x.e * int(m) for m in x.m.flat]


def test_integers_stand_for_the_very_numbers():
    for dtype in (torch.float32, torch.float64):
        finfo = torch.finfo(dtype)
        a = torch.tensor([0.1, -3.0, 0.0, finfo.max, finfo.tiny / 4], dtype=dtype)
        b = torch.tensor([1e-3, 7.0, 2.0, 3.0, -1.0], dtype=dtype)
        x, y = ([Fraction(v) for v in t.double().tolist()] for t in (a, b))
        p, q = Dyadic.of(a), Dyadic.of(b)
        assert fractions(p) == x
        assert fractions(p - q) == [u - v for u, v in zip(x, y, strict=True)]
        assert fractions(p * q) == [u * v for u, v in zip(x, y, strict=True)]
        assert fractions(p @ q) == [sum(u * v for u, v in zip(x, y, strict=True))]
        assert fractions(p.positive()) == [max(u, 0) for u in x]
        assert p.square() == sum(u * u for u in x)
        assert p.nearest().tolist() == a.double().tolist()
        for got, u, v in zip(fractions(p.divide(q)), x, y, strict=True):
            assert abs(got - u / v) <= Fraction(1, 2**BITS)
        for got, u in zip(fractions(p.rounded()), x, strict=True):
            assert abs(got - u) <= Fraction(1, 2**BITS)


@pytest.mark.parametrize("kind", [k for k in KINDS if "tanh" not in k])
def test_exact_logits_are_those_of_the_network(kind):
    torch.manual_seed(0)
    model = KINDS[kind].build().double().eval().requires_grad_(False)
    x = torch.rand(1, *model.shape, dtype=torch.float64)
    (exact,) = rounding.exact_logits(model, x)
    expected = torch.from_numpy(exact.nearest())[None]
    torch.testing.assert_close(model.to_exact(1e-12)(x), expected, rtol=1e-10, atol=1e-10)


def test_a_bound_that_is_too_small_is_counted():
    row = rounding._row("one", torch.float32)
    rounding._count(row, Fraction(1, 4), 0.5)
    assert (row["errors"], row["wrong"], row["nearest"]) == (1, 0, 1.0)
    rounding._count(row, Fraction(1, 4), 0.5 * (1 - 2.0**-53))
    assert (row["errors"], row["wrong"]) == (2, 1)
