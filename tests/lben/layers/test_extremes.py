"""Whatever numbers parameters hold, forward() runs what certificate() proves, or both refuse."""

import math
from fractions import Fraction

import pytest
import torch

from lben import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    EquilibriumConv2d,
    EquilibriumLinear,
    OrthogonalConv2d,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from lben.parameterizations import FixedWeights, Gershgorin, Spectral
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.parameterizations.multipliers import FLOOR, power_of_two
from lben.weights import ConvolutionalWeights, DenseWeights, ImageGeometry
from lben.weights.linear_maps import Dense

DTYPES = [torch.float32, torch.float64]

LAYERS = {
    "SLL": lambda **o: SLLLinear(5, 4, **o),
    "SLL squared": lambda **o: SLLLinear(5, 4, squarings=2, **o),
    "CPL": lambda **o: CPLLinear(5, 4, **o),
    "AOL": lambda **o: AOLLinear(5, 4, **o),
    "AOL with q": lambda **o: AOLLinear(4, 5, learn_q=True, **o),
    "spectral": lambda **o: SpectralLinear(5, 4, **o),
    "Cayley": lambda **o: OrthogonalLinear(5, 4, **o),
    "exponential": lambda **o: OrthogonalLinear(4, 4, orthogonal_map="matrix_exp", **o),
    "Householder": lambda **o: OrthogonalLinear(4, 5, orthogonal_map="householder", **o),
    "sandwich": lambda **o: SandwichLinear(5, 4, **o),
    "SLL of images": lambda **o: SLLConv2d(2, 3, **o),
    "SLL of images, squared": lambda **o: SLLConv2d(2, 3, squarings=1, **o),
    "CPL of images": lambda **o: CPLConv2d(2, 3, **o),
    "AOL of images": lambda **o: AOLConv2d(2, 3, **o),
    "spectral of images": lambda **o: SpectralConv2d(2, 3, **o),
    "sandwich of images": lambda **o: SandwichConv2d(2, 3, **o),
    "Cayley of images": lambda **o: OrthogonalConv2d(2, 3, image=(4, 4), **o),
}


def weight(layer):
    return next(p for p in layer.parameters() if p.ndim > 1)


def scale(size, p):
    """Rows and columns at random powers of two, up to 2^±size."""

    def draw(shape):
        powers = torch.randint(-size, size + 1, shape).double()
        return torch.exp2(powers).to(p.dtype)

    rest = [1] * (p.ndim - 2)
    return torch.randn_like(p) * draw((len(p), 1, *rest)) * draw((1, p.shape[1], *rest))


FILLS = {
    "zero": lambda p: torch.zeros_like(p),
    "one": lambda p: torch.ones_like(p),
    "equal rows": lambda p: torch.randn_like(p[:1]).expand_as(p),
    "denormal": lambda p: torch.randn_like(p) * torch.finfo(p.dtype).tiny / 8,
    "denormal row": lambda p: torch.cat([p[:1] * torch.finfo(p.dtype).tiny / 8, p[1:]]),
    "near overflow": lambda p: torch.randn_like(p).sign() * torch.finfo(p.dtype).max,
    "large": lambda p: torch.randn_like(p) * torch.finfo(p.dtype).max ** 0.4,
    "row near overflow": lambda p: torch.cat([p[:1] * torch.finfo(p.dtype).max / 8, p[1:]]),
    "scales": lambda p: scale(28 if p.dtype == torch.float32 else 240, p),
    "larger scales": lambda p: scale(60 if p.dtype == torch.float32 else 500, p),
    "infinite": lambda p: torch.cat([p[:-1], math.inf * p[-1:]]),
    "NaN": lambda p: torch.cat([p[:-1], math.nan * p[-1:]]),
}


def largest_quotient(layer):
    """Of unit vectors in float64, through the layer's own maps and the tensors that run."""
    tensors = layer.parameterization.compute_in_float64(next(layer.parameters()).dtype)
    shape = (layer.inputs,) if isinstance(layer.map, Dense) else (layer.inputs, 4, 4)
    d = torch.cat([torch.eye(math.prod(shape)).reshape(-1, *shape), torch.randn(8, *shape)])
    d, best = d.double(), 0.0
    for size in (1.0, 2.0**20, 2.0**-20):
        for x in (torch.zeros_like(d), torch.randn_like(d), -d):
            a, b = (layer.evaluate(v * size, torch.float64, tensors).flatten(1) for v in (x, x + d))
            quotient = (a - b).norm(dim=1) / (d * size).flatten(1).norm(dim=1)
            best = max(best, float(quotient.detach().max()))
    return best


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_certificate_agree(kind, fill, dtype):
    layer = LAYERS[kind](dtype=dtype)
    with torch.no_grad():
        weight(layer).copy_(FILLS[fill](weight(layer).clone()))
        x = torch.randn(
            2, layer.inputs, *(() if isinstance(layer.map, Dense) else (4, 4)), dtype=dtype
        )
    image = None if isinstance(layer.map, Dense) else (4, 4)
    for training in (True, False):
        layer.train(training)
        message = refusal(lambda: layer(x))
        if message is None:
            assert fill not in ("infinite", "NaN")
            assert layer.certificate(image).bound == UNIT_BOUND
            assert largest_quotient(layer) <= 1 + 1e-6
        else:
            assert "T leaves the range" in message
            assert fill not in ("zero", "one", "equal rows", "denormal", "denormal row")
            assert refusal(lambda: layer.certificate(image)) == message


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["SLL", "AOL", "sandwich", "SLL of images", "CPL of images"])
def test_the_rounded_weights_are_proved_too(kind):
    layer = LAYERS[kind]()
    with torch.no_grad():
        weight(layer).copy_(scale(28, weight(layer)))
    image = (4, 4) if "images" in kind else None
    assert layer.certificate(image, compute_dtype=torch.bfloat16).bound == UNIT_BOUND


@pytest.mark.parametrize("kind", ["SLL", "SLL squared", "AOL", "CPL", "SLL of images"])
def test_denormal_numbers_taken_for_zeros_break_no_bound(kind):
    layer = LAYERS[kind]()
    with torch.no_grad():
        w = weight(layer)
        w.copy_(torch.randn_like(w) * 2.0**-130)
        w[0] = torch.randn_like(w[0]) * 2.0**40
    image = (4, 4) if "images" in kind else None
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no denormal numbers")
    try:
        tensors = [t.clone() for t in layer.parameterization(torch.float32)]
    finally:
        torch.set_flush_denormal(False)
    # The multiplier that was computed so holds for the numbers as they are stored.
    stored = layer.parameterization(torch.float32)
    assert (tensors[-1] <= stored[-1] * (1 + 2.0**-19)).all()
    assert layer.certificate(image).bound == UNIT_BOUND


@pytest.mark.parametrize("share", [0.0, 0.8, 0.9])
@pytest.mark.parametrize("lost", ["U", "C"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [False, True])
def test_denormal_weights_of_equilibria_taken_for_zeros(images, dtype, lost, share):
    """W = −½I: z = ⅔ max(Ux, 0) and y = Cz, by inputs that make something of what is lost."""
    finfo = torch.finfo(dtype)
    n, p, q = 3, 4, 2
    U, C = (torch.rand(s, dtype=torch.float64) for s in ((n, p), (q, n)))
    U, C = (0.4 * finfo.tiny * t if name == lost else t for name, t in (("U", U), ("C", C)))
    U, C = U.to(dtype), C.to(dtype)
    x = (torch.rand(5, p, dtype=torch.float64) * finfo.max**share).to(dtype)
    W, Lambda = -0.5 * torch.eye(n, dtype=dtype), torch.ones(n, dtype=dtype)
    b, b_y = torch.zeros(n, dtype=dtype), torch.zeros(q, dtype=dtype)
    if images:
        layer = EquilibriumConv2d(p, n, q, 1, image=(1, 1), gamma=None, dtype=dtype)
        kernels = {name: t[..., None, None] for name, t in (("W", W), ("U", U), ("C", C))}
        weights = ConvolutionalWeights(
            **kernels, b=b, D=None, b_y=b_y, Lambda=Lambda, gamma=None, circular=False,
            geometry=ImageGeometry(
                (1, 1), circular=False, state_channels=n, state_kernel=1, input_kernel=1
            ),
        )  # fmt: skip
    else:
        layer = EquilibriumLinear(p, n, q, gamma=None, dtype=dtype)
        weights = DenseWeights(W=W, U=U, b=b, C=C, D=None, b_y=b_y, Lambda=Lambda, gamma=None)
    layer.parameterization = FixedWeights(weights)
    rows = [[[Fraction(a) for a in r] for r in t.double().tolist()] for t in (U, C, x)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no denormal numbers")
    try:
        inputs = x[..., None, None] if images else x
        found = layer.forward_with_error(inputs, layer.certificate())
        y, bound = found.value, found.error
    finally:
        torch.set_flush_denormal(False)
    U, C, x = rows
    for row, got, e in zip(x, y.double().flatten(1).tolist(), bound.tolist(), strict=True):
        v = [sum(a * c for a, c in zip(r, row, strict=True)) for r in U]
        z = [max(t, Fraction(0)) * Fraction(2, 3) for t in v]
        exact = [sum(a * c for a, c in zip(r, z, strict=True)) for r in C]
        away = sum((Fraction(a) - c) ** 2 for a, c in zip(got, exact, strict=True))
        assert e == math.inf or away <= Fraction(e) ** 2


@pytest.mark.parametrize(("dtype", "size"), [
    (torch.float32, 20), (torch.float32, 60), (torch.float64, 300), (torch.float64, 500),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 6), (6, 3), (3, 2, 2, 2)])
def test_gershgorin_lies_above_the_exact_sum_at_every_scale(dtype, size, shape):
    rule = Gershgorin(shape[0], dtype=dtype)
    for _ in range(5):
        with torch.no_grad():
            rule.log_q.normal_(std=5.0)
            U = scale(size // 2, torch.empty(shape, dtype=dtype))
            T = [Fraction(v) if math.isfinite(v) else None for v in rule(U).tolist()]
            q = [Fraction(v) for v in rule._q(U).tolist()]
        rows = [[Fraction(v) for v in r] for r in U.double().flatten(1).tolist()]
        if U.ndim > 2:  # the taps of UUᵀ, by shifting one kernel over the other
            G = correlations(U)
        else:
            G = [[abs(sum(a * b for a, b in zip(r, s, strict=True))) for s in rows] for r in rows]
        for i, t in enumerate(T):
            total = sum(G[i][j] * q[j] for j in range(len(G))) / q[i]
            assert t is None or t >= total
            if t is not None and size <= 20:
                assert t <= max(total * (1 + Fraction(1, 1000)), Fraction(FLOOR))


@pytest.mark.parametrize(("dtype", "big", "small"), [
    (torch.float32, 40, -28), (torch.float32, 60, -16), (torch.float64, 500, -28),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 8), (2, 2, 3, 3)])
def test_rows_of_very_different_scale_have_multipliers_of_their_own(dtype, big, small, shape):
    """Orthogonal rows, whose squares lie further apart than the dtype's range from one unit."""
    U = torch.zeros(shape, dtype=dtype)
    U[0, 0], U[1, 1:] = 0.0, 2.0**small
    if U.ndim == 2:
        U[0, 0] = 2.0**big
    else:
        U[0, 0, 1, 1] = 2.0**big
        U[1, 1] = 0.0
        U[1, 1, 1, 1] = 2.0**small
    T = Gershgorin(2, dtype=dtype)(U).tolist()
    for t, row in zip(T, U.double().flatten(1), strict=True):
        square = sum(Fraction(v) ** 2 for v in row.tolist())
        assert square <= Fraction(t) <= max(square * (1 + Fraction(1, 1000)), Fraction(FLOOR))


def correlations(U):
    """Σ over shifts of |Σ U[i, c, s] U[j, c, s + shift]|, exactly."""
    n, p, k, _ = U.shape
    u = [[[[Fraction(float(v)) for v in r] for r in m] for m in row] for row in U]
    span = range(k)
    return [
        [
            sum(
                abs(sum(
                    u[i][c][a][b] * u[j][c][a + s][b + t]
                    for c in range(p) for a in span for b in span
                    if 0 <= a + s < k and 0 <= b + t < k
                ))
                for s in range(1 - k, k) for t in range(1 - k, k)
            )
            for j in range(n)
        ]
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("squarings", [0, 3])
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 3, 3)])
def test_spectral_bounds_the_largest_row_at_every_scale(shape, squarings):
    """‖U‖₂² is at least the square of a row, exactly; no power of two changes T otherwise."""
    for power in (-100, -50, 0, 50):
        U = torch.randn(shape) * 2.0**power
        T = Spectral(squarings)(U)
        rows = [sum(Fraction(v) ** 2 for v in r) for r in U.double().flatten(1).tolist()]
        assert all(Fraction(t) >= max(rows) for t in T.tolist())
        unscaled = Spectral(squarings)(U * 2.0**-power).double() * 2.0 ** (2 * power)
        torch.testing.assert_close(T.double(), unscaled.clamp_min(FLOOR), rtol=1e-5, atol=0)


def test_powers_of_two_are_exact():
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        x = torch.tensor([0.0, info.tiny / 4, info.tiny, 0.75, 1.0, 1.5, info.max / 4], dtype=dtype)
        unit = power_of_two(x)
        assert (torch.frexp(unit).mantissa == 0.5).all()
        assert (x < unit).all()
        assert (unit <= 2 * x.clamp_min(info.tiny)).all()


def test_where_the_host_cannot_look_what_runs_is_nan():
    layer = SLLLinear(3, 2)
    with torch.no_grad():
        layer.parameterization.U[0, 0] = math.inf
    x = torch.randn(4, 3)
    assert torch.func.vmap(layer)(x).isnan().all()


@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_psi_out_of_range_is_refused(shift):
    layer = SandwichLinear(3, 2)
    with torch.no_grad():
        layer.parameterization.log_psi[0] = shift
    with pytest.raises(ValueError, match="T leaves the range"):
        layer(torch.randn(1, 3))
