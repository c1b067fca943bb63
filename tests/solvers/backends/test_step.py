"""Outcomes are selected, replaced, continued and merged sample by sample."""

import pytest
import torch

from solvers import LeakyReLU, LinearSlope, Outcome, ReLU, Request, Status, ZeroOperator
from solvers.backends.step import Iteration, materialize, slope_coefficients

REQUEST = Request(tol=1e-4, max_steps=10)


def outcome(residual, steps, limited=None, start=0.0):
    r = torch.tensor(residual)
    return Outcome(
        value=start + torch.arange(2.0 * len(r)).reshape(-1, 2),
        residual=r,
        steps=torch.tensor(steps, dtype=torch.long),
        checks=1,
        rounding_limited=None if limited is None else torch.tensor(limited),
    )


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (outcome([1e-5, 1e-4], [3, 10]), Status.CONVERGED),
        (outcome([1e-5, 1e-3], [3, 9]), Status.STALLED),
        (outcome([1e-5, 1e-3], [3, 10]), Status.MAX_STEPS),
        (outcome([1e-5, 1e-3], [3, 9], [False, True]), Status.ROUNDING),
        (outcome([1e-3, 1e-3], [10, 9], [False, True]), Status.MAX_STEPS),
        (outcome([1e-5, torch.nan], [3, 9]), Status.DIVERGED),
        (outcome([1e-5, torch.inf], [3, 9]), Status.DIVERGED),
        (outcome([], []), Status.CONVERGED),
    ],
)
def test_the_worst_sample_decides_the_status(found, status):
    assert found.status(REQUEST) is status


def test_unfinished_are_finite_samples_above_the_tolerance_with_steps_left():
    found = outcome([1e-5, 1e-3, 1e-3, torch.nan, 1e-3], [1, 1, 10, 1, 1], [False] * 4 + [True])
    assert found.find_unfinished(REQUEST).tolist() == [False, True, False, False, False]


def test_selected_samples_are_put_back_where_they_were():
    found, index = outcome([1.0, 2.0, 3.0], [1, 2, 3], [True, False, False]), torch.tensor([2, 0])
    part = found.select(index)
    assert part.residual.tolist() == [3.0, 1.0]
    assert part.rounding_limited.tolist() == [False, True]
    again = found.replace_samples(index, part)
    for name in ("value", "residual", "steps", "rounding_limited"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.checks == 2


def test_what_continues_adds_its_steps():
    found, index = outcome([1.0, 2.0, 3.0], [1, 2, 3]), torch.tensor([1])
    more = outcome([0.5], [7], [True], start=100.0)
    both = found.continue_samples(index, more)
    assert both.steps.tolist() == [1, 9, 3]
    assert both.residual.tolist() == [1.0, 0.5, 3.0]
    assert both.value[1].tolist() == [100.0, 101.0]
    assert both.rounding_limited.tolist() == [False, True, False]
    assert found.steps.tolist() == [1, 2, 3]


def test_the_better_of_two_is_taken_and_nan_never_is():
    one = outcome([1.0, 5.0, torch.nan], [1, 1, 1], [True, True, True], start=100.0)
    other = outcome([2.0, 2.0, 2.0], [9, 9, 9], [False, False, False])
    best = one.take_better(other)
    assert best.residual.tolist() == [1.0, 2.0, 2.0]
    assert best.value[:, 0].tolist() == [100.0, 2.0, 4.0]
    assert best.rounding_limited.tolist() == [True, False, False]
    assert best.steps.tolist() == [1, 1, 1]


def test_kernels_are_given_slopes():
    d = torch.rand(3, 2).T
    slopes, negative = slope_coefficients(LinearSlope(d))
    assert slopes.is_contiguous()
    assert torch.equal(slopes, d)
    assert negative == 0.0
    assert slope_coefficients(LeakyReLU(0.25)) == (None, 0.25)
    assert slope_coefficients(ReLU()) == (None, 0.0)


def test_a_pending_negation_is_done_in_memory():
    x = torch.randn(4, 3)
    negated = materialize(torch._neg_view(x).T)
    assert negated.is_contiguous()
    assert not negated.is_neg()
    assert torch.equal(negated, -x.T)


def test_forward_backward_enters_with_its_first_step_done():
    step = ZeroOperator(torch.ones(2)).relax(1.0)
    assert Iteration(map=step, alpha=1.0, reflected=False).initial_steps == 1
    assert Iteration(map=step, alpha=1.0, reflected=True).initial_steps == 0
