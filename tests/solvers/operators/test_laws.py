"""What every linear operator promises: the published laws for all operators alike, and more."""

import copy
import pickle

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
from solvers.testing import OperatorLaws, written_out
from tests.problems import (
    Kronecker,
    SpectralConvolution,
    block_triangular_operator,
    convolution_operator,
    kronecker_operator,
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
    "of two products": lambda **o: kronecker_operator(2, 4, **o),
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


def steps(W: LinearOperator) -> list[float | torch.Tensor]:
    convolution = getattr(W, "base", W)
    if isinstance(convolution, ConvolutionOperator):
        channels = torch.linspace(0.2, 3, convolution.torus.channels, dtype=W.dtype)
        return [0.3, 4.0, channels.repeat_interleave(convolution.torus.pixels)]
    return [0.3, 4.0, torch.linspace(0.2, 3, W.n, dtype=W.dtype)]


def near(actual, expected, dtype, scale=1.0):
    tolerance = (2e-5 if dtype == torch.float32 else 1e-12) * scale
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


class TestLaws(OperatorLaws):
    @pytest.fixture(autouse=True)
    def _given(self, build):
        self._build = build

    def make_operator(self, dtype):
        return self._build(dtype=dtype)

    def make_steps(self, W):
        return steps(W)


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


def test_constants_are_safe_and_sharp(W, dtype):
    c = W.to(torch.float64).constants()
    root = W.to(torch.float64).metric.detach().sqrt()
    H = (
        root[:, None]
        * (torch.eye(W.n, dtype=torch.float64) - written_out(W.to(torch.float64)))
        / root
    )
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


def test_operators_can_be_sent_to_other_processes(W):
    sent = pickle.loads(pickle.dumps(W))
    torch.testing.assert_close(written_out(sent), written_out(W))
    assert sent.transposed is W.transposed


def test_threads_that_build_at_once_return_the_same(W):
    other = object()
    assert W.memo("marker", lambda: W.memo("marker", lambda: other) and object()) is other


def test_monotone_agrees_with_what_it_stands_for(W):
    assert W.is_monotone()
    assert W.is_monotone() == W.T.is_monotone()
    if not isinstance(W, BlockTriangularOperator):
        assert W.constants().m > 0


def test_table_covers_what_it_says():
    found = {type(build(dtype=torch.float64)) for build in OPERATORS.values()}
    assert found == {
        DenseOperator, LowRankOperator, ZeroOperator, BlockTriangularOperator, ConvolutionOperator,
        SpectralConvolution, LowRankUpdate, Kronecker,
    }  # fmt: skip
    weak = OPERATORS["low rank, weak pivots"](dtype=torch.float64)
    assert (weak.d >= 1).sum() == 2
    assert weak.resolvent(0.3).left.shape[1] == 5
    plain = OPERATORS["block triangular"](dtype=torch.float64)
    assert plain.constants().m < 0
    assert OPERATORS["own metric"](dtype=torch.float64).constants().m > 0
