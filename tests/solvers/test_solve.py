"""A residual is reported as it is, and a status says what it means."""

import numpy as np
import pytest
import torch

from solvers import (
    Anderson,
    BlockSubstitution,
    DenseOperator,
    DouglasRachford,
    ImplicitGradient,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    NonFiniteError,
    NotMonotoneError,
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
    true = exactly.largest_residual(problem, solution.value)
    assert true == pytest.approx(float(solution.residual.max()), rel=1e-4)
    with pytest.raises(SolveError, match="rounding"):
        solve(problem, method, tol=1e-6, max_steps=20000, on_failure="raise")


def test_float64_has_room_for_the_same_problem():
    problem = stiff(torch.float64)
    solution = solve(problem, tol=1e-6, max_steps=20000, on_failure="raise")
    assert exactly.largest_residual(problem, solution.value) <= 1e-6


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
    assert exactly.largest_residual(problem, solution.value) <= 1e-5 * (1 + 1e-2)


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


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_batch_dimensions(shape):
    problem = random_inclusion(6, shape)
    solution = solve(problem, tol=1e-10, on_failure="raise")
    assert solution.value.shape == (*shape, 6)
    assert solution.residual.shape == shape
    assert solution.stats.steps.shape == shape
    assert solution.error_bound.shape == shape


@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_autocast_does_not_reach_the_solver(activation):
    problem = random_inclusion(activation=activation, dtype=torch.float32)
    method = PeacemanRachford(compiled=False)
    expected = solve(problem, method, tol=1e-6, on_failure="raise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = solve(problem, method, tol=1e-6, on_failure="raise")
    assert torch.equal(actual.value, expected.value)


def test_float32_solution_is_within_its_proved_bound_of_the_float64_one():
    problem = random_inclusion(30, (64,), dtype=torch.float32)
    double = Inclusion(problem.operator.to(torch.float64), problem.bias.double(), ReLU())
    exact = solve(double, tol=1e-13, on_failure="raise").value
    solution = solve(problem, tol=1e-5, on_failure="raise")
    error = double.operator.norm(solution.value.double() - exact)
    assert (error <= solution.error_bound).all()


@pytest.mark.parametrize("compiled", [None, False])
def test_zero_bias_is_solved_from_any_start(compiled):
    problem = random_inclusion()
    problem.bias[::2] = 0
    z0 = torch.randn_like(problem.bias)
    solution = solve(problem, PeacemanRachford(compiled=compiled), z0=z0, on_failure="raise")
    assert (solution.value[::2] == 0).all()
    assert (solution.value[1::2] != 0).any()


def test_solution_zero_with_non_zero_bias_terminates():
    # All units dropped: z* = 0 exactly although v ≠ 0 (an adjoint problem of inactive units).
    operator = monotone_operator(8)
    d = torch.zeros(3, 8, dtype=torch.float64)
    d[:, :4] = 1.0
    bias = torch.zeros(3, 8, dtype=torch.float64)
    bias[:, 4:] = torch.randn(3, 4, dtype=torch.float64)
    solution = solve(Inclusion(operator, bias, LinearSlope(d)), tol=1e-12, on_failure="raise")
    assert solution.value.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_far_smaller_than_their_data_are_accepted_at_rounding_level(dtype):
    # One unit barely above zero, the others far below: ‖z‖ ≈ 1e-5 ‖v‖.
    operator = monotone_operator(12, dtype=dtype)
    bias = -torch.rand(200, 12, dtype=dtype) - 0.5
    bias[:, 0] = torch.logspace(-8, -1, 200, dtype=dtype)
    tol = 8 * torch.finfo(dtype).eps
    solution = solve(Inclusion(operator, bias, ReLU()), tol=tol, on_failure="raise")
    assert (solution.value[:, 0] > 0).sum() > 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_bias_is_named(bad):
    problem = random_inclusion()
    problem.bias[4, 2] = bad
    with pytest.raises(NonFiniteError, match="bias contains NaN or Inf in 1 of 9 samples"):
        solve(problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 1e-17}, "tol = 1e-17 is below what torch.float64 can hold"),
        ({"tol": float("nan")}, "below what"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"on_failure": "ignore"}, "on_failure must be"),
        ({"z0": torch.zeros(9, 11, dtype=torch.float64)}, "z0 must have shape"),
        ({"z0": torch.zeros(9, 12)}, "and dtype torch.float64"),
        ({"z0": torch.full((9, 12), torch.nan, dtype=torch.float64)}, "z0 contains NaN"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        solve(random_inclusion(), **options)


def test_tolerance_limit_depends_on_the_dtype():
    with pytest.raises(ValueError, match=r"below what torch\.float32 can hold"):
        solve(random_inclusion(dtype=torch.float32), tol=1e-8)


def test_a_metric_that_is_not_positive_is_named():
    problem = random_inclusion()
    metric = problem.operator.metric.clone()
    metric[3] = -1.0
    operator = DenseOperator(problem.operator.W, metric)
    with pytest.raises(ValueError, match="the metric must be positive, got -1"):
        solve(Inclusion(operator, problem.bias, ReLU()))


def test_weights_that_are_not_finite_are_named():
    problem = random_inclusion()
    W = problem.operator.W.clone()
    W[2, 3] = torch.nan
    for required in (True, False):
        with pytest.raises((NonFiniteError, NotMonotoneError), match=r"not finite|NaN or Inf"):
            solve(
                Inclusion(DenseOperator(W), problem.bias, ReLU()),
                PeacemanRachford(step_size=1.0),
                require_monotone=required,
            )


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    problem = random_inclusion(64, (100,))
    moved = Inclusion(
        DenseOperator(problem.operator.W.cuda(), problem.operator.metric.cuda()),
        problem.bias.cuda(),
        ReLU(),
    )
    torch.testing.assert_close(solve(moved, tol=1e-12).value.cpu(), solve(problem, tol=1e-12).value)
