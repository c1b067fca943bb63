"""Where a loop says that it has converged, exact arithmetic agrees, but for what is allowed."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import (
    Anderson,
    ConvolutionOperator,
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    MixedPrecision,
    NeuralODE,
    PeacemanRachford,
    ReLU,
    SemismoothNewton,
    Sigmoid,
    Softplus,
    Tanh,
    acceptance,
    solve,
)
from tests.problems import convolution_operator, low_rank_operator, monotone_operator
from tests.solvers import exactly

METHODS = [
    PeacemanRachford(compiled=True),
    PeacemanRachford(compiled=False),
    DouglasRachford(),
    SemismoothNewton(patience=0),
    Anderson(),
    ForwardBackward(),
    NeuralODE(),
    MixedPrecision(),
]


def holds(problem, solution, tol):
    """Whether the claim of a converged solve is true, in rational arithmetic."""
    claim = acceptance(problem.operator, problem.activation, tol)
    slope = Fraction(getattr(problem.activation, "negative_slope", 0.0))
    W = exactly.rows(exactly.dense(problem.operator))
    (metric,) = exactly.rows(problem.operator.metric[None])
    for z, v in zip(exactly.rows(solution.value), exactly.rows(problem.bias), strict=True):
        image = exactly.image(W, v, z, slope)
        gap, state, bias, size = (
            math.sqrt(exactly.square(metric, x)) * (1 + 1e-14)
            for x in ([a - b for a, b in zip(image, z, strict=True)], z, v, image)
        )
        if not gap * (1 - 3e-14) <= tol * max(state, size) + claim.rounding(state, bias):
            return False
    return True


@pytest.mark.filterwarnings("ignore::solvers.SolveWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_what_a_converged_solve_claims_is_true(method, dtype):
    eps = torch.finfo(dtype).eps
    for scale in (1.0, 2.0**-90, 2.0**100):
        operator = monotone_operator(9, m=0.5, dtype=dtype)
        v = scale * torch.randn(6, 9, dtype=dtype, generator=torch.Generator().manual_seed(1))
        problem = Inclusion(operator, v, LeakyReLU(0.1))
        for tol in (0.3, 1e-4, 8 * eps):
            solution = solve(problem, method, tol=tol, max_steps=2000)
            if tol > 1e-5 and (scale == 1 or not isinstance(method, MixedPrecision)):
                assert solution.converged
            assert not solution.converged or holds(problem, solution, tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: low_rank_operator(9, 3, dtype=dtype),
        lambda dtype: convolution_operator(2, 3, (3, 4), dtype=dtype),
    ],
)
def test_the_claim_holds_for_every_kind_of_operator(make, dtype, monkeypatch):
    for direct in (600, 0):
        monkeypatch.setattr("solvers.operators.convolution._DIRECT", direct)
        operator = make(dtype)
        v = torch.randn(4, operator.n, dtype=dtype, generator=torch.Generator().manual_seed(2))
        problem = Inclusion(operator, v, ReLU())
        for tol in (1e-3, 64 * torch.finfo(dtype).eps):
            assert holds(problem, solve(problem, tol=tol, on_failure="raise"), tol)


def test_the_rounding_of_many_products_is_allowed_for_and_not_much_more():
    # All products round the sum the same way: n roundings at the size of v.
    n, eps = 400, torch.finfo(torch.float64).eps
    W = torch.full((n, n), 0.49 * eps, dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), torch.ones(1, n, dtype=torch.float64), ReLU())
    true = n * 0.49 * eps * math.sqrt(n)
    rho = acceptance(problem.operator, ReLU(), 4 * eps).rounding(math.sqrt(n), math.sqrt(n))
    assert true < rho < 10 * true


def test_nothing_is_claimed_where_nothing_is_known():
    operator = DenseOperator(torch.full((3, 3), 1e200, dtype=torch.float64))
    assert acceptance(operator, ReLU(), 1e-4).rounding(1.0, 1.0) == math.inf


def test_the_allowance_never_vanishes_by_underflow():
    operator = DenseOperator(torch.zeros(2, 2), torch.full((2,), 1e-30))
    assert acceptance(operator, ReLU(), 1e-4).rounding(1e-38, 0.0) > 0


@pytest.mark.filterwarnings("ignore::solvers.SolveWarning")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-20, 1.0, 1e15]), st.booleans())
def test_random_problems(seed, scale, compiled):
    generator = torch.Generator().manual_seed(seed)
    operator = monotone_operator(5, m=0.2, seed=seed, dtype=torch.float32)
    v = scale * torch.randn(3, 5, generator=generator)
    v *= 10.0 ** torch.randint(-9, 1, (3, 5), generator=generator)
    problem = Inclusion(operator, v, ReLU())
    solution = solve(problem, PeacemanRachford(compiled=compiled), tol=2e-6)
    assert not solution.converged or holds(problem, solution, 2e-6)


def test_smooth_activations_keep_to_their_ulps():
    flint = pytest.importorskip("flint")
    exact = {
        Tanh(): lambda x: x.tanh(),
        Sigmoid(): lambda x: 1 / (1 + (-x).exp()),
        Softplus(): lambda x: x.exp().log1p(),
    }
    before, flint.ctx.prec = flint.ctx.prec, 200
    try:
        for dtype in (torch.float32, torch.float64):
            finfo = torch.finfo(dtype)
            v = torch.cat(
                [
                    torch.linspace(-45, 45, 800, dtype=dtype),
                    torch.logspace(-40, 2, 400, dtype=dtype),
                    -torch.logspace(-40, 2.9, 400, dtype=dtype),
                ]
            )
            for activation, f in exact.items():
                for x, y in zip(v.tolist(), activation(v).tolist(), strict=True):
                    true = float(f(flint.arb(x)))
                    allowed = activation.ulps * finfo.eps * abs(true) + 2 * finfo.tiny
                    assert abs(y - true) <= allowed, (activation, dtype, x)
    finally:
        flint.ctx.prec = before


def test_float32_convolutions_by_cudnn_are_refused():
    operator = ConvolutionOperator(torch.zeros(1, 1, 3, 3, device="meta"), (4, 4))
    assert operator.by_kernels

    class Elsewhere:
        device, dtype, by_kernels = torch.device("cuda"), torch.float32, True

    with pytest.raises(ValueError, match="float32 convolutions on a CUDA device"):
        acceptance(Elsewhere(), ReLU(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_allowance_covers_products_that_cancel(dtype):
    # Wz = 0 exactly, from products of size 2^k: n roundings at that size are within γ_n |W||z|.
    n, size, eps = 64, 2.0**20, torch.finfo(dtype).eps
    signs = torch.ones(n, dtype=dtype)
    signs[::2] = -1
    operator = DenseOperator(size * torch.outer(torch.ones(n, dtype=dtype), signs))
    z = math.sqrt(n)  # ‖z‖ of z = 1
    worst = (n - 1) * 0.5 * eps * n * size * math.sqrt(n)
    rho = acceptance(operator, ReLU(), 1e-4).rounding(z, 0.0)
    assert worst <= rho < 100 * worst


def test_products_in_parts_are_granted_their_rounding(monkeypatch):
    """Tensor cores truncate where they add: twice, and what three products of TF32 leave out."""
    operator = monotone_operator(5, dtype=torch.float32)
    here = acceptance(operator, ReLU(), 1e-4)
    monkeypatch.setattr(DenseOperator, "device", torch.device("cuda"))
    there = acceptance(operator, ReLU(), 1e-4)
    assert there.state > 1.5 * here.state
    assert there.state > 24 * torch.finfo(torch.float32).eps * operator.absolute_gain()
    assert there.bias > 1.5 * here.bias
    double = operator.to(torch.float64)
    there = acceptance(double, ReLU(), 1e-4)
    monkeypatch.undo()
    assert there == acceptance(double, ReLU(), 1e-4)
