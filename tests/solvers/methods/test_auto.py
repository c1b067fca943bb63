import pytest
import torch

from solvers import (
    Auto,
    DenseOperator,
    Determinant,
    DouglasRachford,
    Inclusion,
    InverseGeometricMean,
    LeakyReLU,
    LinearSlope,
    PeacemanRachford,
    ReLU,
    Request,
    SemismoothNewton,
    SolveWarning,
    Tanh,
    solve,
)
from solvers import native as compiled
from solvers.native import Build
from tests.problems import block_triangular_operator, random_inclusion


def test_it_is_the_default_and_the_solution_names_the_choice():
    solution = solve(random_inclusion(), on_failure="raise")
    assert solution.method == "PeacemanRachford()"
    assert solution.stats.loop == (
        "compiled" if "no compiled" not in compiled.status() else "torch"
    )


def test_weights_that_are_not_monotone_go_to_the_method_that_may_still_converge():
    W = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), bias, LeakyReLU(1.0))
    solution = solve(problem, tol=1e-9, require_monotone=False, on_failure="raise")
    assert solution.method == repr(DouglasRachford(step_size=Determinant()))


def test_without_the_compiled_loop_newton_finishes_in_float64(monkeypatch):
    monkeypatch.setattr("solvers.backends.cpu.build", lambda: Build(None, "no compiled kernels"))
    assert Auto().choose(random_inclusion()) == SemismoothNewton()
    assert Auto().choose(random_inclusion(dtype=torch.float32)) == PeacemanRachford()
    assert Auto().choose(random_inclusion(activation=Tanh())) == PeacemanRachford()
    assert solve(random_inclusion(), tol=1e-12, on_failure="raise").stats.loop == "torch"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(20.0, SemismoothNewton(patience=500)), (900.0, SemismoothNewton(patience=0))],
)
def test_the_adjoint_of_a_hard_problem_is_solved_by_lu(steps, expected):
    problem = random_inclusion()
    adjoint = Inclusion(
        problem.operator.T, problem.bias, LinearSlope(torch.ones_like(problem.bias))
    )
    assert Auto().choose_adjoint(steps, adjoint) == expected


def test_singular_weights_are_tried_on_demand_with_a_step_of_one():
    problem = Inclusion(
        DenseOperator(torch.eye(2, dtype=torch.float64)),
        -torch.ones(1, 2, dtype=torch.float64),
        ReLU(),
    )
    assert solve(problem, require_monotone=False, on_failure="raise").value.abs().max() == 0


def test_the_choice_can_be_run_as_a_method():
    problem = random_inclusion()
    assert eval(repr(Auto())) == Auto()
    torch.testing.assert_close(
        solve(problem, Auto(), tol=1e-12).value, solve(problem, PeacemanRachford(), tol=1e-12).value
    )


def test_block_triangular_weights_are_swept():
    operator = block_triangular_operator()
    problem = Inclusion(operator, torch.randn(4, operator.n, dtype=torch.float64), ReLU())
    assert solve(problem, tol=1e-10, on_failure="raise").method == "BlockSubstitution()"


def test_a_dropped_unit_with_a_large_bias_hides_no_residual():
    # 16 roundoffs of the whole bias would be 1.9 here, more than the solution.
    W = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -3.0], [0.0, 3.0, 0.0]])
    bias = torch.tensor([[-1e6, 1.0, 0.1]])
    exact = torch.tensor([[0.0, 0.07, 0.31]])
    for method in (Auto(), PeacemanRachford(compiled=False)):
        problem = Inclusion(DenseOperator(W), bias, ReLU())
        solution = solve(problem, method, tol=1e-5, on_failure="raise")
        torch.testing.assert_close(solution.value, exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("c", [13.0, 40.0])
def test_newton_goes_on_where_the_splitting_stops_and_the_solution_names_both(c):
    # Eigenvalues of I − W at 1e-3 (seven of them) and at 8c: no one step size serves both.
    W = (1 - 1e-3) * torch.eye(8, dtype=torch.float64) - c * torch.ones(8, 8, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    bias = 2 * torch.randn(64, 8, generator=g, dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), bias, ReLU())
    with pytest.warns(SolveWarning):
        solve(problem, PeacemanRachford(), tol=1e-10, max_steps=500)
    solution = solve(problem, tol=1e-10, max_steps=500, on_failure="raise")
    assert solution.method == "PeacemanRachford(), then SemismoothNewton(patience=0)"
    assert solution.stats.max_steps < 520
    # Fewer steps than a Newton step costs are a limit for it too.
    with pytest.warns(SolveWarning, match=r"PeacemanRachford\(\) stopped at its step limit"):
        solve(problem, tol=1e-10, max_steps=100)


def test_smooth_activations_fall_back_to_the_best_guaranteed_step():
    problem = random_inclusion(activation=Tanh())
    request = Request(tol=1e-4, max_steps=5000)
    (other,) = Auto().fallbacks(problem, request)
    assert other == PeacemanRachford(step_size=InverseGeometricMean())
    assert solve(problem, other, tol=1e-8, on_failure="raise").converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda one: 0 * one,
        lambda one: -1e4 * one / len(one),
        lambda one: -1e3 * torch.outer(one[0], one[0]).triu().T @ one / len(one) ** 2,
        lambda one: (1 - 1e-6) * torch.eye(len(one)) - one.triu().T @ one.triu(),
    ],
)
def test_degenerate_weights_are_solved(make, dtype):
    W = make(torch.ones(12, 12)).to(dtype)
    bias = torch.randn(20, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    problem = Inclusion(DenseOperator(W), bias, ReLU())
    assert solve(problem, require_monotone=False, on_failure="raise").converged
