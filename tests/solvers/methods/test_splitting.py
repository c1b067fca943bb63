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
    NotMonotoneError,
    PeacemanRachford,
    ReLU,
    Sigmoid,
    Softplus,
    SolveWarning,
    Status,
    Tanh,
    solve,
)
from solvers.methods.step_size import choose_step_size
from tests.problems import random_inclusion

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
