"""The path of a program whose minimum is known, and the pieces of a Newton step."""

import math

import pytest
import torch

from lben.tightening.central_path import (
    evaluate_log_det_barrier,
    follow_central_path,
    measure_decrement,
    solve_newton_system,
)


class AboveOne:
    """Minimise x so that x ≥ 1: the barrier is −log(x − 1)."""

    parameter = 1

    def evaluate_objective(self, point):
        return point[:, 0]

    def select(self, index):
        return self

    def evaluate_barrier(self, point, weight):
        x = point[:, 0]
        value = x / weight - (x - 1).log()
        return torch.where(x > 1, value, torch.inf)

    def compute_newton_step(self, point, weight):
        slack = point - 1
        gradient = 1 / weight[:, None] - 1 / slack
        return measure_decrement(solve_newton_system(slack[:, :, None].pow(-2), gradient), gradient)


def test_the_path_ends_within_its_gap_of_the_minimum():
    start = torch.tensor([[3.0], [50.0]], dtype=torch.float64)
    rough, fine = (follow_central_path(AboveOne(), start, gap=gap) for gap in (1e-1, 1e-9))
    for end, gap in ((rough, 1e-1), (fine, 1e-9)):
        assert bool((end.gap <= gap).all())
        assert bool((end.point > 1).all())
        assert bool(((end.point[:, 0] - 1) / end.point[:, 0] <= end.gap).all())
    assert rough.steps < fine.steps


def test_a_program_leaves_once_its_target_is_reached_or_out_of_reach():
    start = torch.full((2, 1), 50.0, dtype=torch.float64)
    target = torch.tensor([2.0, 0.5], dtype=torch.float64)
    end = follow_central_path(AboveOne(), start, gap=1e-9, target=target)
    assert float(end.point[0]) <= 2
    assert float(end.point[1]) * (1 - float(end.gap[1])) > 0.5
    assert bool((end.gap > 1e-9).all())


def test_without_steps_nothing_is_known_of_the_gap():
    start = torch.full((1, 1), 2.0, dtype=torch.float64)
    end = follow_central_path(AboveOne(), start, gap=1e-9, max_steps=0)
    assert torch.equal(end.point, start)
    assert math.isinf(float(end.gap))


def test_the_barrier_is_infinite_outside_the_cone():
    inside, outside = torch.diag(torch.tensor([2.0, 4.0])), torch.diag(torch.tensor([2.0, -1.0]))
    found = evaluate_log_det_barrier(torch.stack([inside, outside]).double())
    assert found.tolist() == [pytest.approx(-math.log(8)), math.inf]


def test_newton_systems_are_solved_and_indefinite_ones_end_the_program():
    hessian = torch.tensor([[[4.0, 1.0], [1.0, 3.0]], [[1.0, 2.0], [2.0, 1.0]]]).double()
    gradient = torch.ones(2, 2, dtype=torch.float64)
    direction = solve_newton_system(hessian, gradient)
    torch.testing.assert_close(hessian[0] @ direction[0], -gradient[0])
    assert bool(direction[1].isnan().all())
    step, decrement = measure_decrement(direction, gradient)
    assert float(decrement[0]) == pytest.approx(float(-gradient[0] @ direction[0]) ** 0.5)
    assert step[1].tolist() == [0.0, 0.0]
    assert math.isinf(float(decrement[1]))
