"""What every linear operator promises, checked against W written out, for all operators alike."""

import copy

import pytest
import torch

from solvers import (
    BlockTriangularOperator,
    ConvolutionOperator,
    DenseOperator,
    LinearOperator,
    LowRankOperator,
    LowRankUpdate,
    ZeroOperator,
)
from solvers.native import spectral
from tests.problems import (
    SpectralConvolution,
    block_triangular_operator,
    convolution_operator,
    low_rank_operator,
    monotone_operator,
    updated_convolution_operator,
)


def _nested(**options) -> BlockTriangularOperator:
    inner = block_triangular_operator(seed=3, **options)
    last = low_rank_operator(4, 1, **options)
    coupling = torch.randn(4, inner.n, generator=torch.Generator().manual_seed(4)).to(last.dtype)
    return BlockTriangularOperator([inner, last], {(1, 0): coupling})


OPERATORS = {
    "dense": lambda **o: monotone_operator(9, **o),
    "low rank": lambda **o: low_rank_operator(9, 2, **o),
    "low rank, weak pivots": lambda **o: low_rank_operator(9, 3, weak=2, **o),
    "low rank, constant diagonal": lambda **o: low_rank_operator(9, 2, spread=0.0, **o),
    "rank 0": lambda **o: low_rank_operator(9, 0, **o),
    "zero": lambda dtype: ZeroOperator(torch.linspace(0.5, 2, 9, dtype=dtype)),
    "block triangular": lambda **o: block_triangular_operator(**o),
    "own metric": lambda **o: block_triangular_operator(monotone=True, **o),
    "one block": lambda **o: BlockTriangularOperator([monotone_operator(5, **o)], {}),
    "nested": _nested,
    "convolution": lambda **o: convolution_operator(2, 3, (3, 4), **o),
    "direct convolution": lambda **o: convolution_operator(
        2, 3, (3, 4), kind=ConvolutionOperator, **o
    ),
    "convolution of a pixel": lambda **o: convolution_operator(3, 1, (2, 1), **o),
    "large kernel": lambda **o: convolution_operator(1, 5, (5, 5), **o),
    "convolution plus low rank": updated_convolution_operator,
}


@pytest.fixture(params=OPERATORS)
def build(request):
    return OPERATORS[request.param]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=["W", "its transpose", "its transpose's transpose"])
def W(request, build, dtype) -> LinearOperator:
    operator = build(dtype=dtype)
    return {"W": operator, "its transpose": operator.T}.get(request.param, operator.T.T)


def dense(W: LinearOperator) -> torch.Tensor:
    return W.mv(torch.eye(W.n, dtype=W.dtype)).T.detach().double()


def steps(W: LinearOperator) -> list[float | torch.Tensor]:
    convolution = getattr(W, "base", W)
    if isinstance(convolution, ConvolutionOperator):
        channels = torch.linspace(0.2, 3, convolution.torus.channels, dtype=W.dtype)
        return [0.3, 4.0, channels.repeat_interleave(convolution.torus.pixels)]
    return [0.3, 4.0, torch.linspace(0.2, 3, W.n, dtype=W.dtype)]


def column(step: float | torch.Tensor) -> float | torch.Tensor:
    return step.double()[:, None] if isinstance(step, torch.Tensor) else step


def near(actual, expected, dtype, scale=1.0):
    tolerance = (2e-5 if dtype == torch.float32 else 1e-12) * scale
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_transpose_is_the_adjoint(W, dtype):
    z, y = torch.randn(2, 5, W.n, dtype=dtype)
    near((W.mv(z) * y).sum(-1), (z * W.T.mv(y)).sum(-1).double(), dtype, 10)
    near(W.T.metric, 1 / W.metric.double(), dtype)
    assert W.T.transposed is not W.transposed
    assert W.dtype == dtype == W.mv(z).dtype
    assert W.n == len(W.metric)


def test_product_over_batches(W, dtype):
    z = torch.randn(2, 3, W.n, dtype=dtype)
    near(W.mv(z), z.double() @ dense(W).T, dtype, 10)
    near(W.mv(z[0, 0]), dense(W) @ z[0, 0].double(), dtype, 10)
    near(W.affine(z, z), z.double() @ dense(W).T + z, dtype, 10)


@pytest.mark.parametrize("which", range(3))
def test_resolvent_reflection_and_relaxation(W, dtype, which):
    step = steps(W)[which]
    matrix, eye = dense(W), torch.eye(W.n, dtype=torch.float64)
    R = torch.linalg.inv(eye + column(step) * (eye - matrix))
    x, shift = torch.randn(2, 6, W.n, dtype=dtype)
    resolvent = W.resolvent(step)
    near(resolvent.solve(x), x.double() @ R.T, dtype, 10)
    near(resolvent.solve(x[0]), R @ x[0].double(), dtype, 10)
    z = resolvent.solve(x)
    near(z + step * (z - W.mv(z)), x.double(), dtype, 30)
    R_T = torch.linalg.inv(eye + column(step) * (eye - matrix.T))
    near(resolvent.T.solve(x), x.double() @ R_T.T, dtype, 10)
    near(W.T.resolvent(step).solve(x), x.double() @ R_T.T, dtype, 10)
    near(resolvent.T.T.solve(x), x.double() @ R.T, dtype, 10)
    relaxed = eye + column(step) * (matrix - eye)
    for map_, expected in ((resolvent.reflection(), 2 * R - eye), (W.relax(step), relaxed)):
        kept = x.clone(), shift.clone()
        near(map_.add(x, shift, None), shift + x.double() @ expected.T, dtype, 20)
        out = torch.full_like(x, torch.nan)
        assert map_.add(x, shift, out).data_ptr() == out.data_ptr()
        near(out, shift + x.double() @ expected.T, dtype, 20)
        assert torch.equal(x, kept[0])
        assert torch.equal(shift, kept[1])


def test_resolvents_are_factored_once(build, dtype, monkeypatch):
    W = build(dtype=dtype)
    steps_ = steps(W)
    for step in steps_:
        W.T.resolvent(step)
    for owner in (torch.linalg, spectral):
        name = "inverses" if owner is spectral else "inv_ex"
        monkeypatch.setattr(owner, name, lambda A: pytest.fail("factored twice"))
    for step in steps_:
        W.resolvent(step)
        W.rebuild(tuple(t.clone() for t in W.tensors)).T.resolvent(step)


def test_determinant_diagonal_and_submatrix(W, dtype):
    matrix = dense(W)
    expected = torch.linalg.slogdet(torch.eye(W.n, dtype=torch.float64) - matrix)[1]
    near(torch.tensor(W.log_determinant(), dtype=torch.float64), expected, dtype, 10)
    assert W.T.log_determinant() == pytest.approx(W.log_determinant(), rel=1e-9)
    near(W.diagonal(), matrix.diagonal(), dtype)
    rows, columns = torch.randint(W.n, (3, 4)), torch.randint(W.n, (3, 2))
    picked = torch.stack([matrix[r][:, c] for r, c in zip(rows, columns, strict=True)])
    near(W.submatrix(rows, columns), picked, dtype, 3)
    near(W.submatrix(rows[0], columns), picked_with(matrix, rows[0], columns), dtype, 3)
    near(W.submatrix(torch.arange(W.n), torch.arange(W.n)), matrix, dtype, 3)


def picked_with(matrix, rows, columns):
    return torch.stack([matrix[rows][:, c] for c in columns])


def test_constants_are_safe_and_sharp(W, dtype):
    c = W.to(torch.float64).constants()
    root = W.metric.detach().double().sqrt()
    H = root[:, None] * (torch.eye(W.n, dtype=torch.float64) - dense(W.to(torch.float64))) / root
    m = float(torch.linalg.eigvalsh(0.5 * (H + H.T))[0])
    L = float(torch.linalg.matrix_norm(H, 2))
    rounding = 1e-15 * W.n * L
    assert c.m <= m + rounding
    assert L - rounding <= c.L
    if not isinstance(W, LowRankUpdate):  # whose constants are bounds of a sum
        assert m - 1e-6 * max(abs(m), 1e-3 * L) <= c.m
        assert c.L <= (1 + 1e-6) * L
    own = W.constants()  # of W and its transpose together, whose 1/Λ is rounded
    assert abs(own.m - c.m) + abs(own.L - c.L) <= 1e-5 * c.L


def test_magnitude_covers_the_rounding_of_a_product(W, dtype):
    z = torch.randn(50, W.n, dtype=dtype)
    magnitude = W.magnitude(z.abs()).double()
    exact = z.double() @ dense(W.to(torch.float64)).T
    u = torch.finfo(dtype).eps
    assert (magnitude * (1 + W.n * u) >= z.double().abs() @ dense(W).abs().T - 1e-30).all()
    assert ((W.mv(z).double() - exact).abs() <= (W.summands + 1) * u * magnitude + 1e-13).all()
    error = W.to(torch.float64).norm(W.mv(z).double() - exact)
    assert (error <= W.rounding(z).double() * (1 + 1e-3) + 1e-13).all()


def test_rebuild_shares_the_memo(W):
    tensors = tuple(t.clone().requires_grad_() for t in W.tensors)
    rebuilt = W.rebuild(tensors)
    assert len(rebuilt.tensors) == len(tensors)
    assert all(a is b for a, b in zip(rebuilt.tensors, tensors, strict=True))
    marker = object()
    assert W.memo("marker", lambda: marker) is marker
    assert rebuilt.memo("marker", object) is marker
    assert rebuilt.T.memo("marker", object) is marker
    assert rebuilt.T.T.memo("marker", object) is marker
    # With a graph and without one products may round differently.
    torch.testing.assert_close(dense(rebuilt), dense(W), rtol=0, atol=1e-7)
    assert rebuilt.transposed is W.transposed


def test_the_memo_follows_a_change_in_place(W):
    views = (W, W.T, W.rebuild(tuple(t.detach() for t in W.tensors)))
    old = object()
    assert all(view.memo("marker", lambda: old) is old for view in views)
    if not W.tensors:
        return
    with torch.no_grad():
        W.tensors[0].mul_(0.5)
    for view in views:
        assert view.memo("marker", object) is not old
    new = W.memo("marker", object)
    assert W.T.memo("marker", object) is new
    assert W.memo("marker", object) is new


def test_a_copy_starts_with_an_empty_memo(W):
    W.memo("marker", object)
    assert copy.deepcopy(W).memo("marker", lambda: None) is None


def test_threads_that_build_at_once_return_the_same(W):
    other = object()
    assert W.memo("marker", lambda: W.memo("marker", lambda: other) and object()) is other


def test_precision(W, dtype):
    assert W.to(dtype) is W
    other = torch.float64 if dtype == torch.float32 else torch.float32
    converted = W.to(other)
    assert converted is W.to(other)
    assert converted.dtype == other
    assert all(t.dtype == other for t in (*converted.tensors, converted.metric))
    near(converted.mv(torch.eye(W.n, dtype=other)).T, dense(W), torch.float32)
    near(converted.metric, W.metric.double(), torch.float32)


def test_pullback_is_the_gradient_of_the_product(W, dtype):
    tensors = tuple(t.detach().clone().requires_grad_() for t in W.tensors)
    operator = W.rebuild(tensors)
    u, z = torch.randn(2, 2, 3, W.n, dtype=dtype)
    actual = operator.pullback(u, z)
    assert len(actual) == len(tensors)
    if tensors:
        expected = torch.autograd.grad((u * operator.mv(z)).sum(), tensors)
        for a, e in zip(actual, expected, strict=True):
            near(a, e.double(), dtype, 10)
            assert a.shape == e.shape


def test_pullback_is_differentiable(build):
    W = build(dtype=torch.float64)
    tensors = tuple(t.detach().clone().requires_grad_() for t in W.tensors)
    u, z = torch.randn(2, 2, W.n, dtype=torch.float64).requires_grad_()
    if tensors:
        assert torch.autograd.gradcheck(
            lambda u, z, *t: W.rebuild(t).pullback(u, z), (u, z, *tensors)
        )


def test_monotone_agrees_with_what_it_stands_for(W):
    assert W.is_monotone()
    assert W.is_monotone() == W.T.is_monotone()
    if not isinstance(W, BlockTriangularOperator):
        assert W.constants().m > 0


def test_table_covers_what_it_says():
    found = {type(build(dtype=torch.float64)) for build in OPERATORS.values()}
    assert found == {
        DenseOperator, LowRankOperator, ZeroOperator, BlockTriangularOperator, ConvolutionOperator,
        SpectralConvolution, LowRankUpdate,
    }  # fmt: skip
    weak = OPERATORS["low rank, weak pivots"](dtype=torch.float64)
    assert (weak.d >= 1).sum() == 2
    assert weak.resolvent(0.3).left.shape[1] == 5
    plain = OPERATORS["block triangular"](dtype=torch.float64)
    assert plain.constants().m < 0
    assert OPERATORS["own metric"](dtype=torch.float64).constants().m > 0
