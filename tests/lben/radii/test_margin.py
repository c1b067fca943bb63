"""Certified radii are never above the truth, at any magnitude, in exact rational arithmetic."""

import dataclasses
import math
from fractions import Fraction

import flint
import numpy as np
import pytest
import torch

from lben import (
    CertificateError,
    EquilibriumLinear,
    certify,
    compose,
    margin_radius,
    tighten_pairs,
)
from lben.certificates import IntervalClaim
from lben.radii.margin import pair_bounds
from lben.tightening import tighten_linf

DENORMAL = [
    ([1.5e-323, 0.0], 2.0, 0.0),
    ([0.0, -5e-324], 1.0, 0.0),
    ([0.0, -4.8357779785e-311], [[1.0, 4.2774479941e-311], [4.2774479941e-311, 1.0]], 5e-324),
    ([2.0**-1022, 0.0], 2.0**-1022, 0.0),
    ([1.0, 0.0], 5e-324, 0.0),
    ([1.0, 1.0 - 2.0**-53], 1e-300, 2.0**-60),
]  # fmt: skip


def above_the_truth(radius, y, i, table, error):
    """Say whether r·Lᵢⱼ > yᵢ − yⱼ − √2e for some j; a table's entry is exact, γ is times √2."""
    r, two = Fraction(radius), Fraction(2)
    for j, other in enumerate(y):
        if j == i or radius == 0:
            continue
        gap = Fraction(y[i]) - Fraction(other)
        if isinstance(table, float):  # r√2γ + √2e ≤ gap
            left = r * Fraction(table) + Fraction(error)
            if gap < 0 or two * left * left > gap * gap:
                return True
        else:
            rest = gap - r * Fraction(table[i][j])
            if rest < 0 or two * Fraction(error) ** 2 > rest * rest:
                return True
    return False


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(("y", "bound", "error"), DENORMAL)
def test_radii_among_denormal_numbers(y, bound, error, flush):
    def radius():
        number = bound if isinstance(bound, float) else torch.tensor(bound, dtype=torch.float64)
        logits = torch.tensor([y], dtype=torch.float64)
        return float(margin_radius(logits, torch.tensor([0]), number, logit_error=error))

    torch.set_flush_denormal(flush)
    try:
        if flush and np.min(bound) < 2.0**-1022:  # it is read as zero
            with pytest.raises(ValueError, match="positive"):
                radius()
            return
        found = radius()
    finally:
        torch.set_flush_denormal(False)
    assert not above_the_truth(found, y, 0, bound, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_radii_at_every_magnitude(dtype):
    g = np.random.default_rng(0)
    limits = (-1074, 1023) if dtype == torch.float64 else (-149, 127)
    positive = 0
    for _ in range(1500):
        size = int(g.integers(*limits))
        y = torch.from_numpy(np.ldexp(g.standard_normal((1, 3)), size + g.integers(-2, 1, (1, 3))))
        y = y.clamp(-1.7e308, 1.7e308).to(dtype)
        if not bool(torch.isfinite(y).all()):
            continue
        bound = float(np.ldexp(1 + g.random(), int(g.integers(-1074, 1000))))
        error = float(np.ldexp(g.random(), int(g.integers(-1074, size + 1))))
        if g.random() < 0.5:
            table = np.ldexp(1 + g.random((3, 3)), g.integers(-1070, 1000, (3, 3))).tolist()
            bound = [[max(v, 5e-324) for v in row] for row in table]
        i = int(y.argmax())
        found = float(margin_radius(y, torch.tensor([i]), bound, logit_error=error))
        assert math.isfinite(found)
        positive += found > 0
        assert not above_the_truth(found, y[0].double().tolist(), i, bound, error)
    assert positive > 300


def test_radii_that_overflow_or_have_no_bound():
    y, label = torch.tensor([[1.7e308, -1.7e308]], dtype=torch.float64), torch.tensor([0])
    largest = torch.finfo(torch.float64).max
    assert float(margin_radius(y, label, 1e-10)) == largest
    assert float(margin_radius(y, label, 1e300)) == pytest.approx(3.4e8 / 2**0.5)
    assert float(margin_radius(y, label, math.inf)) == 0
    assert float(margin_radius(y, label, 1.0, logit_error=math.inf)) == 0
    assert float(margin_radius(y, label, math.inf, logit_error=math.inf)) == 0
    close = torch.tensor([[1.0, 0.0]])
    assert float(margin_radius(close, label, 1.0)) == pytest.approx(2**-0.5, rel=1e-12)


def test_an_error_that_is_a_number_keeps_its_digits():
    """In float32 0.01 is less than 0.01."""
    y, label = torch.tensor([[0.01 * 2**0.5, 0.0]], dtype=torch.float64), torch.tensor([0])
    assert float(margin_radius(y, label, 1e-9, logit_error=0.01)) < 1e-6


def layer():
    torch.manual_seed(0)
    return EquilibriumLinear(6, 8, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "kind", ["record", "tuples", "lists", "array", "float32 array", "tensor", "float32 tensor"]
)
def test_bounds_of_pairs_come_as_they_are(kind):
    weights = layer().weights()
    pairs = certify(weights, tighten_pairs(weights, fix_multiplier=True))
    table = {
        "record": pairs, "tuples": pairs.bounds, "lists": [list(row) for row in pairs],
        "array": np.array(pairs), "float32 array": np.array(pairs, dtype=np.float32),
        "tensor": torch.tensor(pairs, dtype=torch.float64), "float32 tensor": torch.tensor(pairs),
    }[kind]  # fmt: skip
    y = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = margin_radius(y, y.argmax(1), table)
    expected = margin_radius(y, y.argmax(1), pairs.tensor())
    tolerance = 1e-6 if "float32" in kind else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0)
    assert pair_bounds(table, 3).dtype == torch.float64
    if kind == "record":
        composed = compose([certify(weights)], table).pairs
        assert composed.tensor().ge(pairs.tensor()).all()
        torch.testing.assert_close(composed.tensor(), pairs.tensor(), rtol=1e-14, atol=0)
    else:
        with pytest.raises(TypeError, match="pairs must be a PairCertificate"):
            compose([certify(weights)], table)


def test_bounds_of_pairs_know_their_weights():
    weights = layer().weights().apply(torch.Tensor.detach)
    pairs = certify(weights, tighten_pairs(weights, fix_multiplier=True))
    assert len(pairs) == 3
    assert pairs[0][1] == pairs.bounds[0][1] == pairs[1][0]
    assert [row[2] for row in pairs] == [row[2] for row in pairs.bounds]
    assert pairs.fingerprint == weights.fingerprint
    assert "bounds" in pairs.to_json()
    other = dataclasses.replace(weights, b_y=weights.b_y + 1)
    with pytest.raises(CertificateError, match="other weights than the last layer"):
        compose([certify(other)], pairs)
    with pytest.raises(CertificateError, match="other weights"):
        compose([], pairs)
    for found in (certify(weights, IntervalClaim()), certify(weights, tighten_linf(weights))):
        assert found.norm == "linf"
        with pytest.raises(CertificateError, match="claim pairs by Claim"):
            compose([certify(weights)], found)


@pytest.mark.parametrize(
    "bound", ["1", None, True, math.nan, -1.0, 0.0, [[1.0, 2.0]], [[1.0, math.nan], [1.0, 1.0]],
              torch.ones(2, 2, dtype=torch.complex64), [["a", "b"], ["c", "d"]],
              [[1.0], [1.0, 2.0]]],
    ids=str,
)  # fmt: skip
def test_bounds_that_are_no_bounds_are_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        margin_radius(torch.zeros(1, 2), torch.tensor([0]), bound)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str
)
def test_labels_of_every_integer_type(dtype):
    """A uint8 index would be a mask."""
    y = torch.tensor([[0.0, 3.0, 1.0], [5.0, 2.0, 1.0]])
    labels = torch.tensor([1, 0])
    table = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 8.0], [4.0, 8.0, 1.0]])
    expected = margin_radius(y, labels, table)
    assert torch.equal(margin_radius(y, labels.to(dtype), table), expected)
    with pytest.raises(ValueError, match="integers"):
        margin_radius(y, labels.float(), table)


@pytest.mark.parametrize("bound", [2, np.float32(2), np.int64(2), torch.tensor(2.0), Fraction(2)])
def test_bounds_are_numbers_of_any_kind(bound):
    y, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert torch.equal(margin_radius(y, label, bound), margin_radius(y, label, 2.0))


def test_an_integer_that_is_no_float_is_rounded_upwards():
    odd = 2**53 + 1
    assert Fraction(float(pair_bounds(odd, 2)[0, 1])) ** 2 >= 2 * Fraction(odd) ** 2


def test_radius_is_the_margin_over_root_two_gamma():
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    radius = margin_radius(logits, labels, 2.0)
    expected = flint.arb(1) / flint.arb(2).sqrt()
    assert radius[0] == pytest.approx(2 / (2 * math.sqrt(2)))
    assert flint.arb(float(radius[0])) < expected
    assert radius[1:].tolist() == [0.0, 0.0]


def test_radius_pays_for_the_error_of_the_logits():
    logits, labels = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
    error = torch.tensor([0.5], dtype=torch.float64)
    radius = margin_radius(logits, labels, 1.0, logit_error=error)
    assert float(radius) == pytest.approx((2 - math.sqrt(2) * 0.5) / math.sqrt(2))
    assert margin_radius(logits, labels, 1.0, logit_error=10.0).item() == 0
    assert margin_radius(logits, labels, math.inf).item() == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"labels must lie in \[0, 3\), got values from 0 to 3"),
        (torch.tensor([-1, 0]), r"got values from -1 to 0"),
        (torch.tensor([0]), "labels must be 2 integers"),
        (torch.tensor([0.0, 1.0]), r"labels must be 2 integers.*float32"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        margin_radius(torch.randn(2, 3), labels, 1.0)


def test_bad_logits_and_bounds_are_refused():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="logits contain NaN"):
        margin_radius(torch.full((2, 3), math.nan), labels, 1.0)
    with pytest.raises(ValueError, match="bound must be positive"):
        margin_radius(torch.randn(2, 3), labels, 0.0)
    with pytest.raises(ValueError, match="classes ≥ 2"):
        margin_radius(torch.randn(2, 1), labels, 1.0)
