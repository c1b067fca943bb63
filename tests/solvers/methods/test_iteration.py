"""The loop in PyTorch stops sample by sample, and keeps the answers of those that have left."""

from dataclasses import dataclass

import pytest
import torch

from solvers import (
    DenseOperator,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    PeacemanRachford,
    ReLU,
    Request,
    Tanh,
    solve,
)
from solvers.methods.iteration import _predict_next_check, _Stall
from tests.problems import random_inclusion


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


def test_the_next_check_is_where_the_rate_says_but_not_beyond_twice_the_steps():
    # From 1 to 1e-2 in 10 steps: 10 more to 1e-4.
    assert _predict_next_check(10, 1e-2, 0, 1.0, tol=1e-4, max_steps=1000) == 20
    assert _predict_next_check(10, 1e-2, 0, 1.0, tol=1e-9, max_steps=1000) == 20
    assert _predict_next_check(10, 1e-2, 0, 1.0, tol=9e-3, max_steps=1000) == 11
    assert _predict_next_check(10, 1e-2, 0, 1.0, tol=1e-4, max_steps=15) == 15
    assert _predict_next_check(10, 2.0, 0, 1.0, tol=1e-4, max_steps=1000) == 20  # no rate


def test_a_residual_is_at_rest_that_has_not_halved_in_a_quarter_and_64_steps():
    stall = _Stall()
    assert not stall.is_at_rest(64, 1.0)
    assert not stall.is_at_rest(100, 1.0)  # too soon to say
    assert stall.is_at_rest(144, 0.6)
    assert not stall.is_at_rest(244, 0.2)


def test_a_float32_sample_leaves_early_where_rounding_of_its_bias_is_what_is_left():
    # z is 1e-6 of v: 16 roundoffs of v are more than tol.
    v = torch.tensor([[1.0, -1.0], [1e-6, -1.0]])
    problem = Inclusion(DenseOperator(torch.tensor([[0.5, 0.0], [0.0, 0.5]])), v, ReLU())
    solution = solve(problem, PeacemanRachford(step_size=0.3, compiled=False), tol=1e-6)
    assert solution.converged
    torch.testing.assert_close(solution.value[:, 0], 2 * v[:, 0], rtol=1e-5, atol=0)


def test_an_empty_batch_takes_no_step():
    problem = random_inclusion(4, (0,))
    found = PeacemanRachford(compiled=False).run(problem, Request(tol=1e-6, max_steps=9))
    assert (found.checks, found.value.shape) == (0, (0, 4))
