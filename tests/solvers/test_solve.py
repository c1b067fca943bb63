"""A residual is reported as it is, and a status says what it means."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from solvers import (
    Anderson,
    BlockSubstitution,
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    ImplicitGradient,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    PeacemanRachford,
    ReLU,
    SemismoothNewton,
    Solution,
    SolveError,
    SolveWarning,
    Status,
    Tanh,
    ZeroOperator,
    equilibrium,
    solve,
)
from tests.problems import block_triangular_operator, monotone_operator, random_inclusion
from tests.solvers import exactly

METHODS = [
    PeacemanRachford(compiled=True), PeacemanRachford(compiled=False), DouglasRachford(),
    SemismoothNewton(), SemismoothNewton(patience=0), Anderson(),
]  # fmt: skip


def stiff(dtype=torch.float32, samples=20):
    """A problem with L/m = 1e5: float32 cannot hold residuals of 1e-6."""
    problem = random_inclusion(30, (samples,), m=0.01, skew=300.0)
    return Inclusion(problem.operator.to(dtype), problem.bias.to(dtype), ReLU())


def true_residual(problem, z):
    """The largest relative residual, of z as it is returned, in rational arithmetic."""
    W = exactly.rows(exactly.dense(problem.operator))
    (metric,) = exactly.rows(problem.operator.metric[None])
    largest = 0.0
    for x, v in zip(exactly.rows(z), exactly.rows(problem.bias), strict=True):
        image = exactly.image(W, v, x)
        gap = exactly.square(metric, [a - b for a, b in zip(image, x, strict=True)])
        size = max(exactly.square(metric, image), exactly.square(metric, x))
        largest = max(largest, float(gap / size) ** 0.5 if size else 0.0)
    return largest


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_rounding_is_named_with_its_number_and_the_next_step(method):
    problem = stiff()
    with pytest.warns(SolveWarning, match="stopped where rounding is what is left"):
        solution = solve(problem, method, tol=1e-6, max_steps=20000)
    assert solution.status is Status.ROUNDING
    assert not solution.converged
    assert float(solution.residual.max()) > 1e-6
    assert "Use float64, or a tol of" in solution.message()
    assert solution.stats.max_steps < 20000  # it stops at rest
    true = true_residual(problem, solution.value)
    assert true == pytest.approx(float(solution.residual.max()), rel=1e-4)
    with pytest.raises(SolveError, match="rounding"):
        solve(problem, method, tol=1e-6, max_steps=20000, on_failure="raise")


def test_float64_has_room_for_the_same_problem():
    problem = stiff(torch.float64)
    solution = solve(problem, tol=1e-6, max_steps=20000, on_failure="raise")
    assert true_residual(problem, solution.value) <= 1e-6


def test_rounding_of_float64_is_named_too():
    with pytest.warns(SolveWarning, match=r"rounding.*Use a tol of"):
        solution = solve(stiff(torch.float64, 3), PeacemanRachford(), tol=2e-15, max_steps=50000)
    assert solution.status is Status.ROUNDING
    assert solution.stats.max_steps < 50000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_solution_that_is_zero_is_found_with_nothing_left(method, dtype):
    operator = monotone_operator(12, m=0.05, skew=3.0, dtype=dtype)
    bias = -torch.rand(30, 12, dtype=dtype)
    bias[::2, :5] = 0.0  # pre-activations that are 0 at the solution
    bias[3] = 0.0
    solution = solve(Inclusion(operator, bias, ReLU()), method, on_failure="raise")
    assert not solution.value.any()
    assert not solution.residual.any()


def test_a_cotangent_of_zero_costs_nothing():
    problem = random_inclusion(10, (6,), dtype=torch.float32)
    bias = problem.bias.clone().requires_grad_()
    z = equilibrium(Inclusion(problem.operator, bias, ReLU()), on_failure="raise").value
    z[:3].sum().backward()
    assert not bias.grad[3:].any()
    slope = LinearSlope(torch.ones_like(problem.bias))
    zero = solve(Inclusion(problem.operator.T, 0 * problem.bias, slope), on_failure="raise")
    assert not zero.value.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flush", [False, True])
def test_a_residual_of_small_numbers_is_not_taken_for_none(dtype, flush):
    tiny = torch.finfo(dtype).tiny
    operator = DenseOperator(torch.full((3, 3), -0.5, dtype=dtype))
    v = torch.full((1, 3), 64 * tiny, dtype=dtype)
    problem = Inclusion(operator, v, ReLU())
    torch.set_flush_denormal(flush)
    try:
        residual = problem.relative_residual(torch.zeros_like(v))
        solution = solve(problem, tol=1e-3, on_failure="raise")
    finally:
        torch.set_flush_denormal(False)
    assert float(residual) == 1.0
    torch.testing.assert_close(solution.value, v / 2.5, rtol=3e-3, atol=0.0)
    subnormal = Inclusion(operator, v * 2.0**-16, ReLU())
    assert float(subnormal.relative_residual(torch.zeros_like(v))) == 1.0


def test_the_residual_hides_nothing_of_a_large_bias():
    # One unit is active, and far smaller than v: its residual is what it is.
    v = torch.tensor([[1e-6, -1.0, -1.0]], dtype=torch.float32)
    problem = Inclusion(DenseOperator(torch.zeros(3, 3)), v, ReLU())
    z = torch.tensor([[1.1e-6, 0.0, 0.0]])
    assert float(problem.relative_residual(z)) == pytest.approx(1 / 11, rel=1e-5)


def test_ordinary_float32_training_does_not_warn():
    # The default tolerance, up to L/m = 1e4.
    for m, skew in ((0.3, 1.0), (0.01, 10.0), (0.003, 30.0)):
        problem = random_inclusion(40, (64,), dtype=torch.float32, m=m, skew=skew)
        bias = problem.bias.clone().requires_grad_()
        z = equilibrium(Inclusion(problem.operator, bias, ReLU()), on_failure="raise").value
        z.square().sum().backward()


def test_sweeps_report_what_is_left():
    operator = block_triangular_operator(monotone=True, dtype=torch.float32)
    v = torch.randn(8, operator.n, generator=torch.Generator().manual_seed(0))
    problem = Inclusion(operator, v, ReLU())
    solution = solve(problem, BlockSubstitution(), tol=1e-5, on_failure="raise")
    assert true_residual(problem, solution.value) <= 1e-5 * (1 + 1e-2)


def test_reduced_products_are_left_for_a_solve():
    seen = []

    class Spy(ReLU):
        def __call__(self, v):
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return torch.relu(v)

    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        problem = random_inclusion(10, (6,), dtype=torch.float32)
        solve(Inclusion(problem.operator, problem.bias, Spy()), on_failure="raise")
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    assert set(seen) == {"ieee"}


# What is given where another kind of thing is wanted.


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (nn.ReLU(), r"pass solvers\.ReLU\(\)"),
        (torch.relu, r"pass solvers\.ReLU\(\)"),
        (nn.functional.leaky_relu, r"pass solvers\.LeakyReLU\(\)"),
        ("tanh", r"pass solvers\.Tanh\(\)"),
        (Tanh, r"pass solvers\.Tanh\(\)"),
        (nn.GELU(), "one of solvers"),
        (None, "one of solvers"),
    ],
)
def test_other_activations_are_refused_at_once(given, named):
    with pytest.raises(TypeError, match=f"activation must be a ProximalActivation.*{named}"):
        Inclusion(monotone_operator(3), torch.ones(2, 3, dtype=torch.float64), given)


@pytest.mark.parametrize(
    ("operator", "bias", "named"),
    [
        (np.eye(3), torch.ones(2, 3), r"operator must be a LinearOperator.*DenseOperator\(W\)"),
        (torch.eye(3), torch.ones(2, 3), r"operator must be a LinearOperator"),
        (monotone_operator(3), np.ones((2, 3)), "bias must be a torch.Tensor, got numpy.ndarray"),
        (monotone_operator(3), [[1.0, 2.0, 3.0]], r"bias must be a torch.Tensor.*torch\.tensor"),
        (monotone_operator(3), torch.ones(2, 3).long(), "bias must hold real floating-point"),
        (monotone_operator(3), torch.ones(2, 3).to(torch.complex64), "bias must hold real"),
    ],
)
def test_other_pieces_are_refused_at_once(operator, bias, named):
    with pytest.raises(TypeError, match=named):
        Inclusion(operator, bias, ReLU())


def test_pieces_of_unequal_types_are_refused_at_once():
    with pytest.raises(ValueError, match=r"bias is torch\.float32.*W is torch\.float64"):
        Inclusion(monotone_operator(3), torch.ones(2, 3), ReLU())


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"method": PeacemanRachford}, TypeError, r"method must.*PeacemanRachford\(\)"),
        ({"method": "newton"}, TypeError, "method must be a solvers.Method, got 'newton'"),
        ({"gradient": ImplicitGradient}, TypeError, r"gradient must.*ImplicitGradient\(\)"),
        ({"gradient": "exact"}, TypeError, "gradient must be a solvers.Gradient"),
        ({"tol": "1e-4"}, TypeError, "tol must be a number"),
        ({"tol": True}, TypeError, "tol must be a number"),
        ({"tol": None}, TypeError, "tol must be a number"),
        ({"tol": torch.tensor(1e-4)}, TypeError, "tol must be a number"),
        ({"tol": 0.0}, ValueError, "tol = 0.0 is below"),
        ({"tol": -1e-3}, ValueError, "tol = -0.001 is below"),
        ({"tol": float("nan")}, ValueError, "tol = nan is below"),
        ({"tol": float("inf")}, ValueError, "tol must be finite"),
        ({"max_steps": 10.0}, TypeError, "max_steps must be an integer"),
        ({"max_steps": "10"}, TypeError, "max_steps must be an integer"),
        ({"max_steps": True}, TypeError, "max_steps must be an integer"),
        ({"max_steps": -1}, ValueError, "max_steps must be at least 1, got -1"),
        ({"on_failure": "rise"}, ValueError, 'on_failure must be "warn" or "raise", got'),
        ({"on_failure": None}, ValueError, 'on_failure must be "warn" or "raise", got'),
        ({"z0": np.zeros((9, 12))}, TypeError, "z0 must be a torch.Tensor"),
    ],
)
def test_other_options_are_refused_by_name(options, error, named):
    with pytest.raises(error, match=named):
        equilibrium(random_inclusion(12, (9,)), **options)


def test_numbers_of_numpy_are_numbers():
    problem = random_inclusion(12, (9,))
    solution = solve(problem, tol=np.float32(1e-3), max_steps=np.int64(50), on_failure="raise")
    assert type(solution.tol) is float


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SemismoothNewton(method=PeacemanRachford), r"method must.*PeacemanRachford\(\)"),
        (lambda: BlockSubstitution(method="newton"), "method must be a solvers.Method"),
        (lambda: Anderson(method=SemismoothNewton()), "method must be a splitting"),
        (lambda: ImplicitGradient(method=BlockSubstitution), r"method must.*BlockSubstitution\(\)"),
        (lambda: PeacemanRachford(step_size="best"), "step_size must be a number or"),
        (lambda: ForwardBackward(step_size=True), "step_size must be a number or"),
    ],
)
def test_methods_check_their_parts(make, named):
    with pytest.raises(TypeError, match=named):
        make()


# Any number of batch dimensions.


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3), (1, 2, 1, 3)])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_batch_dimensions_of_any_number(method, shape):
    problem = random_inclusion(7, (*shape,), m=0.5)
    bias = problem.bias.clone().requires_grad_()
    solution = equilibrium(Inclusion(problem.operator, bias, ReLU()), method, on_failure="raise")
    assert isinstance(solution, Solution)
    assert solution.value.shape == (*shape, 7)
    assert solution.residual.shape == solution.error_bound.shape == shape
    assert solution.stats.steps.shape == shape
    solution.value.sum().backward()
    assert bias.grad.shape == bias.shape
    rows = solve(problem.flatten(), method, on_failure="raise")
    torch.testing.assert_close(solution.value.reshape(-1, 7), rows.value)


def test_w_of_zero_is_evaluated():
    v = torch.randn(4, 5)
    solution = solve(Inclusion(ZeroOperator(torch.ones(5)), v, LeakyReLU()), on_failure="raise")
    torch.testing.assert_close(solution.value, LeakyReLU()(v))


def test_rationals_agree_with_the_float64_evaluation():
    # The tests' own exact arithmetic, against the library's.
    problem = random_inclusion(6, (5,))
    z = torch.randn_like(problem.bias)
    true = true_residual(problem, z)
    assert true == pytest.approx(float(problem.relative_residual(z).max()), rel=1e-12)
    assert Fraction(1, 3) == exactly.product([[Fraction(1, 3)]], [Fraction(1)])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(problem, tol=1e-10)


def test_denormal_numbers_count_where_the_process_reads_them_as_zero():
    W = torch.tensor([[0.5, 0.0], [0.25, 0.0]])
    v = torch.tensor([[1e-40, 3e-42]])  # denormal in float32
    problem = Inclusion(DenseOperator(W), v, ReLU())
    exact = torch.tensor([[2.0, 0.5]], dtype=torch.float64) * v[0, 0].double()
    exact[0, 1] += v[0, 1].double()
    torch.set_flush_denormal(True)
    try:
        bound = problem.error_bound(torch.zeros_like(v))
        solved = solve(problem).error_bound
    finally:
        torch.set_flush_denormal(False)
    assert float(bound) >= float(exact.norm())
    assert float(solved) >= float(exact.norm())  # what was found is zero
    assert float(problem.error_bound(torch.zeros_like(v))) >= float(exact.norm())
