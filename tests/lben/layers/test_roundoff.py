"""Rounding bounds hold in rational arithmetic: worst order, worst scale, every layer."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lben import (
    AOLConv2d,
    AOLLinear,
    AveragePooling,
    CPLConv2d,
    CPLLinear,
    GroupSort,
    Householder,
    Normalize,
    NormalizedLinear,
    NormPooling,
    OrthogonalConv2d,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from lben.weights.growth import absolute_norm, norms_up

IMAGE = (4, 3)

VECTORS = {
    "SLL": lambda **o: SLLLinear(40, 7, **o),
    "CPL": lambda **o: CPLLinear(40, 7, **o),
    "AOL": lambda **o: AOLLinear(40, 7, **o),
    "spectral": lambda **o: SpectralLinear(40, 7, **o),
    "Householder": lambda **o: OrthogonalLinear(40, 7, orthogonal_map="householder", **o),
    "sandwich": lambda **o: SandwichLinear(40, 7, **o),
    "head": lambda **o: NormalizedLinear(40, 7, **o),
    "orthonormal head": lambda **o: NormalizedLinear(40, 7, kind="orthonormal", **o),
}

IMAGES = {
    "SLL": lambda **o: SLLConv2d(2, 3, **o),
    "SLL circular": lambda **o: SLLConv2d(2, 3, circular=True, **o),
    "SLL even": lambda **o: SLLConv2d(2, 3, 2, **o),
    "CPL": lambda **o: CPLConv2d(2, 3, **o),
    "AOL": lambda **o: AOLConv2d(2, 3, **o),
    "spectral": lambda **o: SpectralConv2d(2, 3, **o),
    "sandwich": lambda **o: SandwichConv2d(2, 3, **o),
}

DTYPES = [torch.float32, torch.float64]


def rational(t):
    return [[Fraction(v) for v in row] for row in t.double().flatten(1).tolist()]


def product(A, x):
    return [sum((a * v for a, v in zip(row, x, strict=True) if a and v), Fraction()) for row in A]


def exact(layer, x):
    """The network of `weights()` in rational arithmetic, for σ = ReLU."""
    w = layer.weights()
    w = w.dense(tuple(x.shape[-2:])) if x.ndim == 4 else w
    U, C = rational(w.U), rational(w.C)
    D = None if w.D is None else rational(w.D)
    b, b_y = (rational(t[None])[0] for t in (w.b, w.b_y))
    out = []
    for row in rational(x):
        z = [max(a + c, Fraction()) for a, c in zip(product(U, row), b, strict=True)]
        y = [a + c for a, c in zip(product(C, z), b_y, strict=True)] if z else list(b_y)
        through = [Fraction()] * len(y) if D is None else product(D, row)
        out.append([a + c for a, c in zip(y, through, strict=True)])
    return out


def assert_bounded(layer, x, expected):
    """Check every sample, and return the largest error divided by its bound."""
    with torch.no_grad():
        got, bounds = rational(layer(x)), layer.rounding(x)
    assert bounds.dtype == torch.float64
    assert bounds.isfinite().all()
    worst = 0.0
    for y, e, bound in zip(got, expected, bounds.tolist(), strict=True):
        square = sum((a - c) ** 2 for a, c in zip(y, e, strict=True))
        assert square <= Fraction(bound) ** 2
        worst = max(worst, math.sqrt(float(square / Fraction(bound) ** 2)) if bound else 0.0)
    return worst


def samples(shape, dtype, scale=1.0):
    """Ordinary numbers, cancelling ones, one of every scale, and next to nothing."""
    x = torch.randn(3, *shape, dtype=torch.float64)
    cancelling = x[:1] + 2.0**20 * torch.tensor([1.0, -1.0]).repeat(math.prod(shape))[
        : math.prod(shape)
    ].reshape(1, *shape)
    spread = x[1:2] * 2.0 ** torch.linspace(-30, 10, math.prod(shape)).reshape(1, *shape)
    tiny = x[2:] * torch.finfo(dtype).tiny / scale
    return (torch.cat([x, cancelling, spread, tiny]) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VECTORS)
def test_vectors(kind, dtype):
    layer, x = VECTORS[kind](dtype=dtype), samples((40,), dtype)
    assert_bounded(layer, x, exact(layer, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind, dtype):
    layer, x = IMAGES[kind](dtype=dtype), samples((2, *IMAGE), dtype)
    assert_bounded(layer, x, exact(layer, x))
    x = x.to(memory_format=torch.channels_last)
    assert_bounded(layer.to(memory_format=torch.channels_last), x, exact(layer, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_circular_convolutions_by_transforms(dtype):
    layer, x = OrthogonalConv2d(2, 3, image=IMAGE, dtype=dtype), samples((2, *IMAGE), dtype)
    w, (height, width) = layer.weights(), IMAGE
    kernel = [[rational(k) for k in row] for row in w.D]
    bias = rational(w.b_y[None])[0]
    expected = [
        [
            bias[q] + sum(
                kernel[q][p][a][b] * Fraction(float(row[p][(i - a) % height][(j - b) % width]))
                for p in range(2) for a in range(height) for b in range(width)
            )
            for q in range(3) for i in range(height) for j in range(width)
        ]
        for row in x
    ]  # fmt: skip
    assert_bounded(layer, x, expected)


@pytest.mark.parametrize("batch", [1, 8, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["SLL", "AOL", "sandwich", "head"])
def test_a_bias_in_the_accumulator(kind, dtype, batch):
    """Every product is just below half a unit in the last place of the bias that comes first."""
    p, half = 400, 0.49 * torch.finfo(dtype).eps
    make = {
        "SLL": lambda: SLLLinear(p, 2, dtype=dtype),
        "AOL": lambda: AOLLinear(p, 2, dtype=dtype),
        "sandwich": lambda: SandwichLinear(p, 2, dtype=dtype),
        "head": lambda: NormalizedLinear(p, 2, dtype=dtype),
    }
    layer = make[kind]()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0 if name.rsplit(".")[-1] in ("U", "V", "weight") else 0.0)
            if name.rsplit(".")[-1] in ("b", "b_y", "bias"):
                parameter.fill_(1.0)
        if kind == "sandwich":
            layer.parameterization.b.fill_(0.25)
            entries = layer.parameterization.parametrizations.AB.original
            entries.copy_(torch.randn_like(entries))
    w = layer.weights()
    first = (w.U if w.hidden_features else w.D)[0]
    size = float((w.b if w.hidden_features else w.b_y).detach()[0])
    x = (half * size / first).to(dtype).expand(batch, p).contiguous()
    assert_bounded(layer, x, exact(layer, x[:1]) * batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_worst_order_of_summation_comes_near_the_bound(dtype):
    """One accumulator that starts from the bias, to which no product is added in effect."""
    p, number = 400, {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    head = NormalizedLinear(p, 1, dtype=dtype)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.fill_(1.0)
    row = head.weights().D[0].to(dtype)
    x = (0.49 * torch.finfo(dtype).eps / row)[None]
    total = number(1.0)
    for a, v in zip(row.numpy(), x[0].numpy(), strict=True):
        total = number(total + number(a * v))
    error = abs(Fraction(float(total)) - exact(head, x)[0][0])
    assert 0.3 < float(error) / float(head.rounding(x)) < 1


@pytest.mark.parametrize(("dtype", "scale"), [
    (torch.float32, 60), (torch.float32, -60), (torch.float64, 500), (torch.float64, -500),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["SLL", "CPL", "AOL", "sandwich", "head"])
def test_extreme_scales_of_weights_and_inputs(kind, dtype, scale):
    layer = VECTORS[kind](dtype=dtype)
    with torch.no_grad():
        weight = next(p for p in layer.parameters() if p.ndim > 1)
        rows = torch.ones(len(weight), 1, dtype=dtype)
        rows[::2] = 2.0**scale
        if kind != "sandwich":
            weight.mul_(rows)
    for size in (1.0, 2.0 ** (scale / 2)):
        x = samples((40,), dtype, size)
        assert_bounded(layer, x, exact(layer, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VECTORS)
def test_denormal_numbers_taken_for_zeros(kind, dtype):
    layer = VECTORS[kind](dtype=dtype)
    x = samples((40,), dtype, torch.finfo(dtype).tiny)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.flatten()[-1:] = 0.3 * torch.finfo(dtype).tiny
            if name.rsplit(".")[-1] in ("b", "b_y", "bias"):
                parameter.zero_()  # nothing else may hide what is lost
    expected = exact(layer, x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no denormal numbers")
    try:
        with torch.no_grad():
            y, bound = layer(x), layer.rounding(x)
    finally:
        torch.set_flush_denormal(False)
    for row, e, b in zip(rational(y), expected, bound.tolist(), strict=True):
        assert sum((a - c) ** 2 for a, c in zip(row, e, strict=True)) <= Fraction(b) ** 2


def patches(row, channels, size):
    """Pixels of every 2 × 2 patch of images of channels × size × size."""
    image = [
        [row[(c * size + i) * size : (c * size + i + 1) * size] for i in range(size)]
        for c in range(channels)
    ]
    return [
        [image[c][2 * i + s][2 * j + t] for s in (0, 1) for t in (0, 1)]
        for c in range(channels)
        for i in range(size // 2)
        for j in range(size // 2)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-130, 2.0**-100, 2.0**90])
def test_companions(dtype, scale):
    x = samples((2, 4, 4), dtype, scale if dtype == torch.float32 else scale**8)
    rows = rational(x)
    average = [[sum(p) / 2 for p in patches(r, 2, 4)] for r in rows]
    assert_bounded(AveragePooling(2), x, average)
    # The root to 200 bits more than the numbers have.
    precise = 2**1400
    norm = [
        [
            Fraction(math.isqrt(int(sum(v * v for v in p) * precise**2)), precise)
            for p in patches(r, 2, 4)
        ]
        for r in rows
    ]
    with torch.no_grad():
        y, bound = NormPooling(2)(x), NormPooling(2).rounding(x)
    for row, e, b in zip(rational(y), norm, bound.tolist(), strict=True):
        limit = Fraction(b) + Fraction(1, 2**1300)
        assert sum((a - c) ** 2 for a, c in zip(row, e, strict=True)) <= limit**2
    assert_bounded(GroupSort(), x, [
        [f(a, b) for f in (min, max) for a, b in zip(r[:16], r[16:], strict=True)] for r in rows
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalisation(dtype):
    layer = Normalize((0.3, 0.4), (0.1, 7.0)).to(dtype)
    x = samples((2, 4, 4), dtype)
    x[0] = layer.mean.to(dtype) * (1 + 2 * torch.finfo(dtype).eps)  # nearly all of it cancels
    mean, std = (
        [Fraction(v) for v in t.double().flatten().tolist()] for t in (layer.mean, layer.std)
    )
    expected = [
        [(v - mean[i // 16]) / std[i // 16] for i, v in enumerate(row)] for row in rational(x)
    ]
    assert_bounded(layer, x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [0.0, 1e-6, math.pi / 2, 3.0, 1000.0])
def test_reflections(dtype, angle):
    layer, x = Householder(2, dtype=dtype), torch.randn(200, 2, dtype=dtype)
    with torch.no_grad():
        layer.theta.fill_(angle)
        y, bound = layer(x), layer.rounding(x)
        if dtype == torch.float64:  # the same with twice the digits where there are any
            pytest.importorskip("flint")
            from flint import arb, ctx

            ctx.prec = 300
            half = arb(float(layer.theta)) / 2
            s, c = half.sin(), half.cos()
            for (a, b), got, e in zip(x.tolist(), y.tolist(), bound.tolist(), strict=True):
                across = s * arb(a) - c * arb(b)
                beyond = 2 * across if across > 0 else arb(0)
                away = (arb(got[0]) - (a - beyond * s)) ** 2 + (arb(got[1]) - (b + beyond * c)) ** 2
                assert away < arb(e) ** 2
        else:
            wide = Householder(2, dtype=torch.float64)
            wide.theta.copy_(layer.theta)
            away = (wide(x.double()) - y.double()).norm(dim=1)
            assert (away <= bound).all()


def test_what_overflows_has_no_bound():
    for layer, x in (
        (SLLLinear(4, 3), torch.full((1, 4), 3e38)),
        (NormalizedLinear(4, 3), torch.full((1, 4), 3e38)),
        (AveragePooling(2), torch.full((1, 1, 2, 2), 3e38)),
        (Normalize((0.0,), (1e-3,)), torch.full((1, 1, 2, 2), 3e36)),
    ):
        assert layer.rounding(x).tolist() == [math.inf]
        for value in (math.inf, math.nan):
            assert layer.rounding(torch.full_like(x, value)).tolist() == [math.inf]


def test_norms_are_upper_bounds_at_every_scale():
    for dtype in DTYPES:
        for scale in (torch.finfo(dtype).tiny * 2**-20, 1.0, torch.finfo(dtype).max / 16):
            x = torch.rand(3, 7, dtype=dtype) * scale
            for row, found in zip(rational(x), norms_up(x, 1).tolist(), strict=True):
                square = sum(v * v for v in row)
                assert square <= Fraction(found) ** 2
                assert scale < 1 or Fraction(found) ** 2 <= square * (1 + Fraction(1, 10**6))
    U = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    assert absolute_norm(U * 2.0**900) >= 2.0**900 * absolute_norm(U) * (1 - 1e-9)
    assert absolute_norm(torch.full((2, 2), math.nan)) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SLLLinear(3, 2).rounding_growth((3,), torch.float64), "own precision"),
        (lambda: SLLLinear(3, 2).rounding_growth((4,), torch.float32), "expected 3 features"),
        (lambda: SLLConv2d(3, 2).rounding_growth((3,), torch.float32), "3 dimensions"),
        (lambda: NormalizedLinear(3, 2).rounding_growth((3,), torch.float64), "in torch.float32"),
        (lambda: GroupSort().rounding_growth((4,), torch.bfloat16), "float32 and float64"),
        (lambda: Normalize((0.5,), (1.0,)).rounding_growth((4,), torch.float32), "height, width"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_algorithms_that_sum_otherwise_have_no_bound(monkeypatch):
    if not torch.backends.nnpack.is_available():
        pytest.skip("no NNPACK")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Winograd"):
        SLLConv2d(3, 2).rounding_growth((3, 8, 8), torch.float32)
