import warnings
from dataclasses import dataclass

import pytest
import torch

from solvers import (
    Anderson,
    DenseOperator,
    Determinant,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    InverseGeometricMean,
    LeakyReLU,
    LinearSlope,
    NonFiniteError,
    NotMonotoneError,
    PeacemanRachford,
    ReLU,
    Sigmoid,
    Softplus,
    SolveError,
    SolveWarning,
    Status,
    Tanh,
    solve,
)
from solvers.methods.step_size import choose_step_size
from tests.problems import monotone_operator, random_inclusion

METHODS = [
    PeacemanRachford(),
    PeacemanRachford(step_size=Determinant()),
    PeacemanRachford(step_size=InverseGeometricMean()),
    PeacemanRachford(step_size=0.05),
    PeacemanRachford(step_size=7.0),
    DouglasRachford(),
    DouglasRachford(relaxation=0.9, step_size=0.5),
    ForwardBackward(),
    Anderson(),
    Anderson(method=ForwardBackward()),
    Anderson(method=DouglasRachford(), memory=2),
]
ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_every_method_reaches_the_fixed_point_of_every_activation(method, activation):
    problem = random_inclusion(activation=activation)
    solution = solve(problem, method, tol=1e-11, max_steps=20000, on_failure="raise")
    z = solution.value
    torch.testing.assert_close(
        z, activation(problem.operator.mv(z) + problem.bias), atol=1e-9, rtol=1e-9
    )
    assert solution.status is Status.CONVERGED
    assert (solution.residual <= 1e-11).all()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_relu_solution_solves_the_complementarity_problem(method):
    problem = random_inclusion()
    z = solve(problem, method, tol=1e-12, max_steps=20000, on_failure="raise").value
    slack = z - problem.operator.mv(z) - problem.bias
    assert (z >= 0).all()
    assert (slack >= -1e-9).all()
    assert (z * slack).abs().max() < 1e-9


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-8])
def test_error_bound_holds_and_is_not_idle(activation, tol):
    problem = random_inclusion(20, (50,), activation, seed=3)
    exact = solve(problem, tol=1e-14, max_steps=5000, on_failure="raise").value
    solution = solve(problem, tol=tol, on_failure="raise")
    error = problem.operator.norm(solution.value - exact)
    assert (error <= solution.error_bound + 1e-12).all()
    assert (solution.error_bound <= 100 * error.max() + 1e-11).all()


def test_error_bound_holds_for_arbitrary_points():
    problem = random_inclusion(20, (500,), Tanh())
    exact = solve(problem, tol=1e-14, on_failure="raise").value
    for scale in (1e-6, 1.0, 1e3):
        z = exact + scale * torch.randn_like(exact)
        assert (problem.operator.norm(z - exact) <= problem.error_bound(z)).all()


def test_error_bound_is_infinite_without_monotonicity():
    operator = DenseOperator(1.5 * torch.eye(3, dtype=torch.float64))
    problem = Inclusion(operator, torch.ones(1, 3, dtype=torch.float64), ReLU())
    assert problem.error_bound(problem.bias).isinf().all()


def test_error_bound_is_infinite_where_nothing_is_known():
    problem = random_inclusion()
    z = problem.bias.clone()
    z[1, 2], z[3, 0] = torch.nan, torch.inf
    infinite = [i in (1, 3) for i in range(9)]
    assert problem.error_bound(z).isinf().tolist() == infinite
    d = torch.full_like(z, 0.5)
    d[1, 0], d[3, 1], d[5] = 1.5, -1e-9, 1.0
    problem = Inclusion(problem.operator, problem.bias, LinearSlope(d))
    assert problem.error_bound(torch.zeros_like(z)).isinf().tolist() == infinite


@pytest.mark.parametrize("compiled", [None, False])
def test_a_residual_that_rounding_of_the_tolerance_accepts_is_not_left_behind(compiled):
    problem = random_inclusion(5, (1,), dtype=torch.float32)
    method = PeacemanRachford(compiled=compiled)
    residual = solve(problem, method, tol=1e-3).residual
    below = float(residual.double() * (1 - 1e-9))
    assert float(residual) > below == pytest.approx(float(residual))
    assert torch.tensor(below, dtype=torch.float32) == residual
    solution = solve(problem, method, tol=below, on_failure="raise")
    assert float(solution.residual) <= below


@pytest.mark.parametrize("compiled", [None, False])
def test_zero_bias_is_solved_from_any_start(compiled):
    problem = random_inclusion()
    problem.bias[::2] = 0
    z0 = torch.randn_like(problem.bias)
    solution = solve(problem, PeacemanRachford(compiled=compiled), z0=z0, on_failure="raise")
    assert (solution.value[::2] == 0).all()
    assert (solution.value[1::2] != 0).any()


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


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_batch_dimensions(shape):
    problem = random_inclusion(6, shape)
    solution = solve(problem, tol=1e-10, on_failure="raise")
    assert solution.value.shape == (*shape, 6)
    assert solution.residual.shape == shape
    assert solution.stats.steps.shape == shape
    assert solution.error_bound.shape == shape


def test_samples_do_not_disturb_each_other():
    # Finished samples leave the batch: each keeps the answer of its own check.
    problem = random_inclusion(30, (40,), LeakyReLU(0.1), m=0.05, skew=3.0)
    problem = Inclusion(
        problem.operator,
        problem.bias * torch.logspace(-6, 3, 40, dtype=torch.float64)[:, None],
        problem.activation,
    )
    together = solve(problem, tol=1e-9, max_steps=3000, on_failure="raise")
    assert len(together.stats.steps.unique()) > 1
    for i in range(0, 40, 7):
        alone = solve(
            Inclusion(problem.operator, problem.bias[i], problem.activation),
            tol=1e-12,
            max_steps=3000,
        )
        torch.testing.assert_close(together.value[i], alone.value, rtol=1e-6, atol=1e-12)


@dataclass(frozen=True, kw_only=True)
class Scripted(PeacemanRachford):
    """Returns prepared points, one per check."""

    points: list[list[float]]

    def value(self, problem, state):
        return torch.tensor(self.points.pop(0), dtype=torch.float64)[:, None]


def test_a_finished_sample_that_leaves_its_tolerance_again_keeps_its_answer():
    operator = DenseOperator(torch.zeros(1, 1, dtype=torch.float64))
    problem = Inclusion(operator, torch.ones(4, 1, dtype=torch.float64), ReLU())
    method = Scripted(points=[[1.0, 2.0, 2.0, 2.0], [9.0, 1.0, 2.0, 2.0], [1.0, 1.0]])
    solution = solve(problem, method, tol=1e-6, on_failure="raise")
    assert solution.value.squeeze(1).tolist() == [1.0] * 4
    method = Scripted(points=[[1.0, 2.0, 2.0, 2.0], [9.0, 1.0, 1.0, 1.0]])
    assert solve(problem, method, tol=1e-6).converged


@pytest.mark.parametrize("method", [PeacemanRachford(), ForwardBackward()], ids=repr)
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_warm_start_at_the_solution_is_accepted_at_the_first_check(method, activation):
    problem = random_inclusion(20, (30,), activation, m=0.5)
    cold = solve(problem, method, tol=1e-10, max_steps=20000, on_failure="raise")
    warm = solve(problem, method, tol=1e-9, z0=cold.value, on_failure="raise")
    assert warm.stats.checks == 1
    assert warm.stats.max_steps < cold.stats.max_steps
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-7, atol=1e-9)


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


def test_determinant_rule_is_near_the_best_constant_step():
    for seed in range(5):
        problem = random_inclusion(40, (20,), seed=seed, m=0.1, skew=2.0)
        grid = torch.logspace(-2, 1, 40).tolist()
        steps = [
            solve(problem, PeacemanRachford(step_size=a), tol=1e-6, max_steps=2000).stats.max_steps
            for a in grid
        ]  # fmt: skip
        chosen = solve(problem, tol=1e-6).stats.max_steps
        assert chosen <= 1.3 * min(steps)


def test_peaceman_rachford_contracts_no_slower_than_its_proved_factor():
    problem = random_inclusion(15, (30,), m=0.2, skew=2.0)
    alpha, c = 0.2, problem.operator.constants()
    exact = solve(problem, tol=1e-14, max_steps=5000, on_failure="raise").value
    factor = (1 - 4 * alpha * c.m / (1 + 2 * alpha * c.m + alpha**2 * c.L**2)) ** 0.5
    method = PeacemanRachford(step_size=alpha)
    state = method.init(problem, None)
    star = exact + alpha * (exact - problem.operator.mv(exact) - problem.bias)
    # ū* is the reflection of u* through the resolvent: 2z* − u*.
    distance = problem.operator.norm(state.x - (2 * exact - star))
    for _ in range(25):
        state = method.step(problem, state)
        now = problem.operator.norm(state.x - (2 * exact - star))
        assert (now <= factor * distance * (1 + 1e-9) + 1e-13).all()
        distance = now


def test_douglas_rachford_at_full_relaxation_is_peaceman_rachford():
    problem = random_inclusion(15, (30,), Tanh(), m=0.2, skew=2.0)
    one = solve(problem, PeacemanRachford(), tol=1e-9, on_failure="raise")
    other = solve(problem, DouglasRachford(relaxation=1.0), tol=1e-9, on_failure="raise")
    torch.testing.assert_close(one.value, other.value, rtol=1e-10, atol=1e-12)
    assert torch.equal(one.stats.steps, other.stats.steps)


def test_douglas_rachford_converges_without_strong_monotonicity():
    # I − W is skew, m = 0: Peaceman–Rachford's map is an isometry here and goes round for ever.
    W = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), bias, LeakyReLU(1.0))
    with pytest.raises(NotMonotoneError, match=r"m = .* ≤ 0, so the equilibrium need not exist"):
        solve(problem, DouglasRachford(step_size=1.0))
    solution = solve(
        problem,
        DouglasRachford(step_size=1.0),
        tol=1e-9,
        on_failure="raise",
        require_monotone=False,
    )
    expected = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - W, bias[0])
    torch.testing.assert_close(solution.value[0], expected, rtol=1e-7, atol=1e-9)
    method = PeacemanRachford(step_size=1.0)
    with pytest.warns(SolveWarning):
        assert not solve(problem, method, tol=1e-9, require_monotone=False).converged


@pytest.mark.parametrize("relaxation", [0.0, -0.5, 1.01, float("nan")])
def test_bad_relaxations_are_refused(relaxation):
    with pytest.raises(ValueError, match=r"relaxation must lie in \(0, 1\]"):
        DouglasRachford(relaxation=relaxation)


def test_forward_backward_diverges_above_its_limit_and_says_why():
    problem = random_inclusion(20, (5,), LeakyReLU(0.9), m=0.1, skew=6.0)
    c = problem.operator.constants()
    alpha = 60 * c.m / c.L**2
    with pytest.warns(SolveWarning, match=r"step size .* is above 2m/L² = "):
        solution = solve(problem, ForwardBackward(step_size=alpha), tol=1e-6, max_steps=3000)
    assert not solution.converged
    assert choose_step_size(alpha, problem.operator) == alpha


def test_failure_warns_or_raises_with_numbers_and_advice():
    problem = random_inclusion(20, (8,), m=0.01, skew=5.0)
    message = (
        r"solve by PeacemanRachford\(\) stopped at its step limit "
        r"after 3 steps with relative residual .* > tol 1e-10 \(8 of 8 samples\)\. Causes: .*m = "
    )
    with pytest.warns(SolveWarning, match=message):
        solution = solve(problem, tol=1e-10, max_steps=3)
    assert solution.status is Status.MAX_STEPS
    with pytest.raises(SolveError, match=message):
        solve(problem, tol=1e-10, max_steps=3, on_failure="raise")
    with pytest.raises(SolveError, match="stopped at its step limit"):
        solution.raise_if_failed()


def test_failure_of_weights_that_are_not_monotone_points_at_the_certificate():
    W = torch.tensor([[0.0, -9.0], [-9.0, 0.0]], dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), torch.ones(1, 2, dtype=torch.float64) * 5, Tanh())
    method = PeacemanRachford(step_size=1.0)
    with pytest.warns(SolveWarning, match="not monotone in the Λ norm"):
        solve(problem, method, tol=1e-12, max_steps=20, require_monotone=False)


def test_divergence_is_reported_as_such():
    W = -3 * torch.eye(4, dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), torch.ones(2, 4, dtype=torch.float64), LeakyReLU(1.0))
    with pytest.raises(SolveError, match="diverged to a value that is not finite"):
        solve(
            problem, ForwardBackward(step_size=1.0), tol=1e-6, max_steps=10000, on_failure="raise"
        )


def test_success_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "≤ tol" in solve(random_inclusion()).message()


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


@pytest.mark.parametrize("step", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_step_sizes_are_refused(step):
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        PeacemanRachford(step_size=step)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(3, 11, dtype=torch.float64), "must have 12 units"),
        (torch.zeros(3, 12), "bias is torch.float32 on cpu, W is torch.float64"),
        (torch.zeros(3, 12, dtype=torch.float64, device="meta"), "on meta, W is torch.float64 on"),
    ],
)
def test_bias_that_does_not_fit_is_refused(bias, message):
    problem = random_inclusion()
    with pytest.raises(ValueError, match=message):
        solve(Inclusion(problem.operator, bias, ReLU()))


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


def test_method_repr_is_python():
    method = PeacemanRachford(step_size=0.3)
    assert eval(repr(method)) == method


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    problem = random_inclusion(64, (100,))
    moved = Inclusion(
        DenseOperator(problem.operator.W.cuda(), problem.operator.metric.cuda()),
        problem.bias.cuda(),
        ReLU(),
    )
    torch.testing.assert_close(solve(moved, tol=1e-12).value.cpu(), solve(problem, tol=1e-12).value)
