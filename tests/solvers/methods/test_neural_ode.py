import math

import pytest
import torch

from solvers import (
    DenseOperator,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    NeuralODE,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
    equilibrium,
    solve,
)
from solvers.methods.neural_ode import _STAGES
from tests.problems import random_inclusion

ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()]
FLOWS = [NeuralODE(), NeuralODE(order=1), NeuralODE(time_step=0.6, step_size=0.2)]


@pytest.mark.parametrize("method", FLOWS, ids=repr)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_flow_ends_at_the_fixed_point_of_every_activation(method, activation):
    problem = random_inclusion(6, (4,), activation, m=1.0, skew=0.5)
    expected = solve(problem, tol=1e-13, on_failure="raise").value
    z = solve(problem, method, tol=1e-11, max_steps=20000, on_failure="raise").value
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    warm = solve(problem, method, tol=1e-9, z0=z, on_failure="raise")
    assert warm.stats.checks == 1


def test_a_whole_step_of_euler_is_forward_backward():
    problem = random_inclusion(6, (4,), Tanh(), m=1.0)
    euler = solve(problem, NeuralODE(order=1, time_step=1.0), tol=1e-9, max_steps=20000)
    plain = solve(problem, ForwardBackward(), tol=1e-9, max_steps=20000)
    torch.testing.assert_close(euler.value, plain.value, rtol=1e-12, atol=1e-14)
    assert torch.equal(euler.stats.steps, plain.stats.steps)


def advance(problem, method, z, steps=1):
    state = method.init(problem, z)
    for _ in range(steps):
        state = method.step(problem, state)
    return state.x


@pytest.mark.parametrize("order", [1, 4])
def test_the_order_is_the_one_claimed(order):
    # Halving h divides the error over a fixed time by 2^order.
    problem = random_inclusion(activation=Tanh(), m=0.3)
    z = torch.randn_like(problem.bias)
    exact = advance(problem, NeuralODE(order=4, time_step=1 / 256, step_size=0.2), z, 256)
    errors = []
    for n in (4, 8):
        method = NeuralODE(order=order, time_step=1 / n, step_size=0.2)
        errors.append(float((advance(problem, method, z, n) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def spiral(k, activation):
    W = torch.tensor([[0.0, -k], [k, 0.0]], dtype=torch.float64)
    return Inclusion(DenseOperator(W), torch.ones(1, 2, dtype=torch.float64), activation)


@pytest.mark.parametrize(("order", "k"), [(1, 2.0), (1, 4.0), (4, 3.0), (4, 4.0)])
@pytest.mark.parametrize("activation", [LeakyReLU(1.0), Tanh()], ids=repr)
def test_the_naive_flow_spirals_out_where_this_one_converges(order, k, activation):
    # α = 1 makes the field σ(Wz + v) − z. Tanh keeps it bounded: it goes round for ever.
    problem = spiral(k, activation)
    star = solve(problem, tol=1e-13, on_failure="raise").value
    z = star + 1e-3
    naive = advance(problem, NeuralODE(order=order, step_size=1.0), z, 60)
    assert (naive - star).norm() > 10 * (z - star).norm()
    ours = solve(problem, NeuralODE(order=order), tol=1e-10, z0=z, on_failure="raise").value
    torch.testing.assert_close(ours, star, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k", [2.5, 4.0])
def test_the_naive_flow_parts_trajectories_that_this_one_brings_together(k):
    # Small steps: it is the flow that does not contract, not the Runge–Kutta method.
    problem = spiral(k, ReLU())
    z = torch.tensor([[0.0, 5.0]], dtype=torch.float64)  # units 1 off, 2 on: D = diag(0, 1)
    other = z + 1e-3 * torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    before = float((z - other).norm())
    problem.bias[0, 1] = 10.0
    naive, ours = (NeuralODE(time_step=1e-3, step_size=a) for a in (1.0, 1 / (1 + k**2)))
    parted = float((advance(problem, naive, z) - advance(problem, naive, other)).norm())
    assert parted == pytest.approx(before * (1 + 1e-3 * (k / 2 - 1)), rel=1e-5)
    assert parted > before
    assert (advance(problem, ours, z) - advance(problem, ours, other)).norm() < before


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("time_step", [1.0, 0.4])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, LeakyReLU(1.0)], ids=repr)
def test_one_step_contracts_no_slower_than_its_factor(order, time_step, activation):
    tightest = 0.0
    for seed in range(3):
        problem = random_inclusion(8, (100,), activation, seed=seed, m=0.3, skew=2.0)
        c = problem.operator.constants()
        alpha = c.m / c.L**2
        q = math.sqrt(1 - 2 * alpha * c.m + (alpha * c.L) ** 2)
        method = NeuralODE(order=order, time_step=time_step, step_size=alpha)
        x, y = torch.randn(2, 100, 8, dtype=torch.float64)
        for _ in range(5):
            before = problem.operator.norm(x - y)
            x, y = advance(problem, method, x), advance(problem, method, y)
            factor = float((problem.operator.norm(x - y) / before).max())
            reach = -time_step * (1 - q)
            assert factor <= sum(reach**i / math.factorial(i) for i in range(order + 1)) + 1e-12
            assert factor <= math.sqrt(1 - time_step * (1 - q * q) / 6) < 1
            tightest = max(tightest, factor / (1 + reach))
    assert tightest > 0.9


@pytest.mark.parametrize("order", [1, 4])
def test_the_limit_of_the_time_step_is_the_radius_of_circle_contractivity(order):
    # Dahlquist and Jeltsch (1979): contraction up to h = r, −1/r the smallest eigenvalue below.
    shares, weights = torch.tensor(_STAGES[order], dtype=torch.float64).T
    A = torch.diag(shares[1:], -1)
    M = weights[:, None] * A + (weights[:, None] * A).T - weights[:, None] * weights
    scaled = M / (weights[:, None] * weights).sqrt()
    assert float(torch.linalg.eigvalsh(scaled)[0]) == pytest.approx(-1.0, abs=1e-12)


def test_gradients_pass():
    problem = random_inclusion(6, (4,), Tanh(), m=1.0)
    problem.bias.requires_grad_()
    gradients = []
    for method in (NeuralODE(), None):
        z = equilibrium(problem, method, tol=1e-12, max_steps=20000, on_failure="raise").value
        gradients.append(torch.autograd.grad(z.square().sum(), problem.bias)[0])
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 2}, r"order must be 1 \(Euler\) or 4 \(classical\), got 2"),
        ({"time_step": 1.01}, r"time_step must lie in \(0, 1\], got 1.01"),
        ({"time_step": 0.0}, r"time_step must lie in \(0, 1\], got 0.0"),
        ({"time_step": float("nan")}, r"time_step must lie in \(0, 1\]"),
        ({"step_size": -1.0}, "step_size must be positive and finite"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(**options)


def test_repr_is_python():
    method = NeuralODE(order=1, time_step=0.5)
    assert repr(method) == "NeuralODE(order=1, time_step=0.5)"
    assert eval(repr(method)) == method
