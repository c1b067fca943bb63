"""Activations of networks: their slopes and curvature are proved, their rounding holds."""

import pickle
from dataclasses import replace
from fractions import Fraction
from math import comb

import pytest
import torch

from lben.weights.activation import (
    ABS,
    GELU,
    GELU_TANH,
    HARDSIGMOID,
    HARDSWISH,
    IDENTITY,
    LOG_SIGMOID,
    MISH,
    RELU,
    RELU6,
    SELU,
    SIGMOID,
    SILU,
    SOFTSIGN,
    TANH,
    Activation,
    make_celu,
    make_elu,
    make_hardtanh,
    make_leaky_relu,
    make_softplus,
    make_softshrink,
)

PIECEWISE_LINEAR = [
    RELU, IDENTITY, ABS, RELU6, HARDSIGMOID, make_leaky_relu(0.01), make_leaky_relu(-0.5),
    make_leaky_relu(2.0), make_hardtanh(-1.0, 1.0), make_softshrink(0.5),
]  # fmt: skip
BY_ANALYSIS = [GELU, GELU_TANH, SILU, MISH]
OTHERS = [
    TANH, SIGMOID, LOG_SIGMOID, SOFTSIGN, SELU, HARDSWISH, make_softplus(),
    make_softplus(3.0), make_elu(), make_elu(2.0), make_elu(-0.5), make_celu(),
    make_celu(0.3),
]  # fmt: skip
ALL = [*PIECEWISE_LINEAR, *BY_ANALYSIS, *OTHERS]
by_name = pytest.mark.parametrize("activation", ALL, ids=lambda a: a.name)


@by_name
def test_no_chord_leaves_the_slopes(activation):
    for scale in (0.1, 1.0, 5.0):
        a, b = scale * torch.randn(2, 50_000, dtype=torch.float64)
        apart = (a - b).abs() > 1e-3 * scale
        slope = ((activation(a) - activation(b)) / (a - b))[apart]
        room = 1e-9 + 2 * activation.absolute_error / (1e-3 * scale)
        assert bool((slope >= activation.low - room).all())
        assert bool((slope <= activation.high + room).all())


@by_name
def test_the_slopes_are_approached(activation):
    v = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
    slope = activation(v).diff() / v.diff()
    assert slope.min() <= activation.low + 1e-2
    assert slope.max() >= activation.high - 1e-2


@by_name
def test_the_slope_jumps_at_knots_and_has_the_curvature_elsewhere(activation):
    v = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    h = 1e-3
    bend = (activation(v + h) - 2 * activation(v) + activation(v - h)).abs() / h**2
    smooth = torch.ones(len(v), dtype=torch.bool)
    for knot in activation.knots:
        smooth &= (v - knot).abs() > 2 * h
    assert bool((bend[smooth] <= activation.curvature + 1e-6 / 1e-3).all())
    assert bend[smooth].max() >= 0.99 * activation.curvature - 1e-3
    if activation.knots and activation.name != "ELU(1.0)":
        assert bend[~smooth].max() > activation.curvature + 0.1 / h * min(1, activation.high)


# Slope and second derivative as polynomials, lowest power first, of a variable in an interval:
# t = tanh v, s = 1/(1 + e^(−v)), or w = eᵛ for v ≤ 0. The slope of Softsign is w² for
# w = 1/(1 + |v|), and its second derivative ±2w³.
def times(a, b):
    out = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += Fraction(x) * Fraction(y)
    return out


ONE_SIDED = (0, 1)
POLYNOMIALS = {
    TANH: ((-1, 1), [1, 0, -1], times([0, -2], [1, 0, -1])),
    SIGMOID: (ONE_SIDED, [0, 1, -1], times([0, 1, -1], [1, -2])),
    LOG_SIGMOID: (ONE_SIDED, [0, 1], [0, -1, 1]),
    SOFTSIGN: (ONE_SIDED, [0, 0, 1], [0, 0, 0, 2]),
    make_softplus(): (ONE_SIDED, [0, 1], [0, 1, -1]),
    make_softplus(3.0): (ONE_SIDED, [0, 1], times([3], [0, 1, -1])),
    make_elu(): (ONE_SIDED, [0, 1], [0, 1]),
    make_elu(2.0): (ONE_SIDED, [0, 2], [0, 2]),
    make_elu(-0.5): (ONE_SIDED, [0, -0.5], [0, -0.5]),
    make_celu(): (ONE_SIDED, [0, 1], [0, 1]),
    make_celu(0.3): (ONE_SIDED, [0, 1], [0, 1 / Fraction(0.3)]),
    SELU: (
        ONE_SIDED,
        *[times([Fraction("1.6732632423543772848170429916717")],
                [0, Fraction("1.0507009873554804934193349852946")])] * 2,
    ),
    HARDSWISH: ((-3, 3), [Fraction(1, 2), Fraction(1, 3)], [Fraction(1, 3)]),
}  # fmt: skip


def bernstein(polynomial, low, high):
    """Return the Bernstein coefficients on an interval: the values lie in their hull."""
    n = len(polynomial) - 1
    shifted = [Fraction(0)] * (n + 1)
    for k, c in enumerate(polynomial):
        for i in range(k + 1):
            shifted[i] += Fraction(c) * comb(k, i) * (high - low) ** i * low ** (k - i)
    return [sum(Fraction(comb(j, i), comb(n, i)) * shifted[i] for i in range(j + 1))
            for j in range(n + 1)]  # fmt: skip


def lies_within(polynomial, interval, low, high):
    pieces = [tuple(map(Fraction, interval))]
    while pieces:
        start, end = pieces.pop()
        found = bernstein(polynomial, start, end)
        if not (min(found) >= Fraction(low) and max(found) <= Fraction(high)):
            if end - start < 1e-6:
                return False
            pieces += [(start, (start + end) / 2), ((start + end) / 2, end)]
    return True


@pytest.mark.parametrize("activation", OTHERS, ids=lambda a: a.name)
def test_slopes_and_curvature_are_proved_in_rational_arithmetic(activation):
    interval, slope, second = POLYNOMIALS[activation]
    assert lies_within(slope, interval, activation.low, activation.high)
    bound = activation.curvature
    assert lies_within(second, interval, -bound, bound)
    assert not lies_within(second, interval, -0.99 * bound, 0.99 * bound)


@pytest.fixture
def flint():
    flint = pytest.importorskip("flint")
    before, flint.ctx.prec = flint.ctx.prec, 100
    yield flint
    flint.ctx.prec = before


def series(flint, activation, v, length=4):
    """Return the Taylor coefficients of σ at every point of the interval v."""
    arb, x = flint.arb, flint.arb_series([v, 1], length)
    if activation is GELU:
        return x * ((x / arb(2).sqrt()).erf() + 1) / 2
    if activation is SILU:
        return x / ((-x).exp() + 1)
    if activation is MISH:
        w = x.exp()
        n = w * w + w * 2
        return x * n / (n + 2)
    inner = (x + x * x * x * arb(0.044715)) * (2 / arb.pi()).sqrt()
    return x / ((-2 * inner).exp() + 1)  # ½(1 + tanh u) = 1/(1 + e^(−2u))


def enclose(flint, activation, low, high):
    """Return slope and second derivative on [low, high], expanded about the middle."""
    arb = flint.arb
    v, middle = arb((low + high) / 2, (high - low) / 2), arb((low + high) / 2)
    wide, at = series(flint, activation, v), series(flint, activation, middle)
    d2, d3 = 2 * wide[2], 6 * wide[3]
    first = (at[1] + d2 * (v - middle)).intersection(wide[1])
    return first, (2 * at[2] + d3 * (v - middle)).intersection(d2)


def holds(flint, activation, facts):
    """Say whether the facts hold for |v| ≤ 10."""
    pieces = [(k / 4, (k + 1) / 4) for k in range(-40, 40)]
    while pieces:
        low, high = pieces.pop()
        first, second = enclose(flint, activation, low, high)
        if not (facts.low <= first <= facts.high and abs(second) <= facts.curvature):
            if high - low < 1e-6:
                return False
            pieces += [(low, (low + high) / 2), ((low + high) / 2, high)]
    return True


@pytest.mark.parametrize("activation", BY_ANALYSIS, ids=lambda a: a.name)
def test_slopes_and_curvature_are_proved_in_interval_arithmetic(activation, flint):
    assert holds(flint, activation, activation)
    for name in ("low", "high", "curvature"):
        smaller = replace(activation, **{name: getattr(activation, name) * (1 - 1e-7)})
        assert not holds(flint, activation, smaller)


@pytest.mark.parametrize("activation", BY_ANALYSIS, ids=lambda a: a.name)
def test_beyond_ten_the_functions_are_nearly_straight(activation, flint):
    """For v ≤ −10, σ(v) = vp(v), and σ(−v) = −v(1 − p̃(v)), with p and p̃ nearly 0.

    p, |p'| and |p''| are at most Be^v there. GELU: e^(−v²/2) ≤ e^(5v). GELU(tanh): p ≤ e^(8v), and
    its derivatives add a polynomial. SiLU: p = 1/(1 + e^(−v)), |p'| = p(1 − p) and |p''| ≤ p. Mish:
    with w = e^v and n = w² + 2w, p = n/(n + 2), p' = 2n'/(n + 2)² and so on, and
    p̃ = 2w²/(1 + 2w + 2w²). So slopes differ from 0 or 1 by at most B(1 + |v|)e^(−|v|),
    which falls with |v|, and second derivatives are at most B(2 + |v|)e^(−|v|).
    """
    B = 10 if activation is MISH else 1
    R = flint.arb(10)
    slope, second = B * (1 + R) * (-R).exp(), B * (2 + R) * (-R).exp()
    assert slope < -activation.low
    assert 1 + slope < activation.high
    assert second < activation.curvature


@by_name
def test_rounding_stays_below_its_bound(activation, flint):
    arb = flint.arb
    references = {
        "Tanh": lambda v: v.tanh(),
        "Sigmoid": lambda v: 1 / (1 + (-v).exp()),
        "LogSigmoid": lambda v: -((-v).exp() + 1).log(),
        "Softsign": lambda v: v / (1 + abs(v)),
        "Softplus(1.0)": lambda v: (v.exp() + 1).log(),
        "Softplus(3.0)": lambda v: ((3 * v).exp() + 1).log() / 3,
        "ELU(1.0)": lambda v: v if v > 0 else v.expm1(),
        "ELU(2.0)": lambda v: v if v > 0 else 2 * v.expm1(),
        "ELU(-0.5)": lambda v: v if v > 0 else v.expm1() / -2,
        "CELU(1.0)": lambda v: v if v > 0 else v.expm1(),
        "CELU(0.3)": lambda v: v if v > 0 else arb(0.3) * (v / arb(0.3)).expm1(),
        "SELU": lambda v: (
            arb("1.0507009873554804934193349852946")
            * (v if v > 0 else arb("1.6732632423543772848170429916717") * v.expm1())
        ),
        "Hardswish": lambda v: v if v > 3 else v * (v + 3) / 6 if v > -3 else arb(0),
        "Hardsigmoid": lambda v: arb(1) if v > 3 else (v + 3) / 6 if v > -3 else arb(0),
        "LeakyReLU(0.01)": lambda v: v if v > 0 else arb(0.01) * v,
        "LeakyReLU(-0.5)": lambda v: v if v > 0 else -v / 2,
        "LeakyReLU(2.0)": lambda v: v if v > 0 else 2 * v,
        "Softshrink(0.5)": lambda v: v - 0.5 if v > 0.5 else v + 0.5 if v < -0.5 else arb(0),
    }
    if activation.name in references:
        exact = references[activation.name]
    elif activation in BY_ANALYSIS:

        def exact(v):
            return series(flint, activation, v, 1)[0]
    else:
        return  # it moves or drops numbers
    flint.ctx.prec = 1200  # e^(−300) is added to 1
    points = torch.cat([torch.randn(300) * s for s in (1e-9, 1e-2, 1.0, 6.0, 30.0, 300.0)]).double()
    for v, y in zip(points.tolist(), activation(points).tolist(), strict=True):
        error = abs(exact(arb(v)) - arb(y))
        allowed = arb(activation.relative_error) * abs(arb(y)) + arb(activation.absolute_error)
        assert error <= allowed, (v, y)


def test_slopes_and_knots_out_of_order_are_refused():
    with pytest.raises(ValueError, match="slopes must be in order"):
        Activation(name="x", low=1.0, high=0.0, function=torch.relu)
    with pytest.raises(ValueError, match="knots must increase"):
        Activation(name="x", low=0.0, high=1.0, knots=(1.0, 0.0), function=torch.relu)


@pytest.mark.parametrize(
    ("make", "numbers", "message"),
    [
        (make_leaky_relu, (float("nan"),), "negative_slope must be finite"),
        (make_hardtanh, (1.0, 1.0), "largest value must be above"),
        (make_hardtanh, (0.0, float("inf")), "must be finite"),
        (make_softshrink, (0.0,), "threshold must be positive"),
        (make_softplus, (0.0,), "beta must be positive"),
        (make_elu, (float("inf"),), "alpha must be finite"),
        (make_celu, (-1.0,), "alpha must be positive"),
    ],
)
def test_parameters_without_a_bounded_slope_are_refused(make, numbers, message):
    with pytest.raises(ValueError, match=message):
        make(*numbers)


@by_name
def test_activations_go_to_other_processes(activation):
    copy, v = pickle.loads(pickle.dumps(activation)), torch.linspace(-3, 3, 13)
    assert copy == activation
    assert torch.equal(copy(v), activation(v))
