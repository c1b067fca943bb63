import pytest
import torch

from solvers import (
    DenseOperator,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    NotMonotoneError,
    PeacemanRachford,
    ReLU,
    SemismoothNewton,
    SolveWarning,
    Tanh,
    solve,
)
from tests.problems import monotone_operator, random_inclusion


@pytest.mark.parametrize("patience", [0, 5, 200])
@pytest.mark.parametrize("activation", [ReLU(), LeakyReLU(0.2), LeakyReLU(1.0)], ids=repr)
@pytest.mark.parametrize("compiled", [None, False])
def test_it_reaches_the_last_digits(activation, patience, compiled):
    problem = random_inclusion(30, (20,), activation, m=0.05, skew=5.0)
    method = SemismoothNewton(method=PeacemanRachford(compiled=compiled), patience=patience)
    solution = solve(problem, method, tol=1e-13, on_failure="raise")
    exact = solve(problem, PeacemanRachford(), tol=1e-14, on_failure="raise")
    torch.testing.assert_close(solution.value, exact.value, rtol=1e-9, atol=1e-11)


def test_one_or_two_steps_finish_a_splitting():
    problem = random_inclusion(60, (50,), m=0.01, skew=20.0)
    plain = solve(problem, PeacemanRachford(), tol=1e-13, on_failure="raise")
    near = solve(problem, PeacemanRachford(), tol=1e-6, on_failure="raise")
    method = SemismoothNewton(patience=0)
    finished = solve(problem, method, z0=near.value, tol=1e-13, on_failure="raise")
    assert finished.stats.max_steps <= 2
    assert plain.stats.max_steps > near.stats.max_steps + 50


def test_a_linear_problem_takes_one_step():
    operator = monotone_operator(30, m=0.001, skew=30.0)
    d = (torch.rand(20, 30, dtype=torch.float64) > 0.5).double()
    d[0] = 0.0
    problem = Inclusion(operator.T, torch.randn(20, 30, dtype=torch.float64), LinearSlope(d))
    solution = solve(problem, SemismoothNewton(patience=0), tol=1e-12, on_failure="raise")
    assert solution.stats.max_steps == 1
    u = solution.value
    torch.testing.assert_close(u, d * (operator.T.mv(u) + problem.bias), rtol=1e-9, atol=1e-10)


def test_cycling_newton_steps_are_caught_by_the_splitting():
    # From zero, Newton alone runs round on hard problems: the splitting must carry them through.
    problem = random_inclusion(60, (200,), m=0.01, skew=20.0)
    method = SemismoothNewton(patience=0)
    solution = solve(problem, method, tol=1e-10, max_steps=20000, on_failure="raise")
    assert solution.stats.max_steps > 8
    assert (solution.residual <= 1e-10).all()


def test_wide_active_sets_are_solved_one_at_a_time_with_two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        operator = monotone_operator(220, dtype=torch.float32, m=0.1)
        d = torch.ones(30, 220)
        problem = Inclusion(operator, torch.randn(30, 220), LinearSlope(d))
        solution = solve(problem, SemismoothNewton(patience=0), tol=1e-5, on_failure="raise")
        assert solution.stats.max_steps == 1
    finally:
        torch.set_num_threads(threads)


def test_singular_systems_fail_with_a_message():
    operator = DenseOperator(torch.eye(3, dtype=torch.float64))  # I − W = 0
    bias = torch.ones(2, 3, dtype=torch.float64)
    problem = Inclusion(operator, bias, ReLU())
    with pytest.raises(NotMonotoneError, match=r"m = .* ≤ 0"):
        solve(problem, SemismoothNewton())
    method = SemismoothNewton(method=ForwardBackward(step_size=1.0), patience=0)
    with pytest.warns(SolveWarning, match="not monotone in the Λ norm"):
        solve(problem, method, max_steps=50, require_monotone=False)


def test_smooth_activations_are_refused():
    with pytest.raises(ValueError, match=r"whose slope changes at 0 alone .*, got Tanh\(\)"):
        solve(random_inclusion(activation=Tanh()), SemismoothNewton())


def test_negative_patience_is_refused():
    with pytest.raises(ValueError, match="patience must be at least 0, got -1"):
        SemismoothNewton(patience=-1)
