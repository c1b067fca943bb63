"""A solution says how its solve ended, and what to do where it failed."""

import warnings

import numpy as np
import pytest
import torch

from solvers import (
    DenseOperator,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    PeacemanRachford,
    SolveError,
    SolveWarning,
    Stats,
    Status,
    Tanh,
    solve,
)
from solvers.solution import check_options
from tests.problems import random_inclusion


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


def test_the_slowest_sample_counts():
    assert Stats(steps=torch.tensor([[3, 9], [1, 2]]), checks=1).max_steps == 9
    assert Stats(steps=torch.zeros(0, dtype=torch.long), checks=0).max_steps == 0


def test_options_come_back_as_numbers_of_python():
    tol, steps = check_options(np.float32(0.5), np.int64(7), "warn")
    assert (type(tol), type(steps)) == (float, int)
    assert (tol, steps) == (0.5, 7)


def test_the_error_bound_is_evaluated_on_demand_and_once(monkeypatch):
    calls, original = [], Inclusion.error_bound
    monkeypatch.setattr(
        Inclusion, "error_bound", lambda self, z: calls.append(1) or original(self, z)
    )
    solution = solve(random_inclusion(5, (2, 3)))
    assert not calls
    assert solution.error_bound.shape == (2, 3)
    assert solution.error_bound is solution.error_bound
    assert len(calls) == 1
