"""Slope bounds make a bound smaller, and the program of z̃ is that of the same network."""

import pytest
import torch

from lben import EquilibriumLinear
from lben.tightening.local import (
    WIDTH,
    LocalProgram,
    tighten_locally,
    tighten_with_constraints,
    widen_slope_bounds,
)


def problem(low, high, q=2):
    torch.manual_seed(0)
    with torch.no_grad():
        w = EquilibriumLinear(5, 6, q, gamma=3.0, dtype=torch.float64).weights()
    low, high = (torch.full((1, 6), s, dtype=torch.float64) for s in (low, high))
    return LocalProgram(
        W=w.W, U=w.U[None], C=w.C[None], D=w.C.new_zeros(1, q, 5), Lambda=w.Lambda, low=low,
        high=high,
    )  # fmt: skip


def test_widened_slope_bounds_contain_those_given():
    low, high = (torch.tensor([[a, 1.0, b]]).double() for a, b in ((0.0, 0.3), (0.0, 0.7)))
    wider = widen_slope_bounds(low, high)
    assert bool(((wider[0] <= low) & (high <= wider[1])).all())
    assert bool((wider[1] - wider[0] >= WIDTH).all())
    assert bool(((wider[0] >= 0) & (wider[1] <= 1)).all())
    assert torch.equal(wider[0][:, 2], low[:, 2])


def test_narrower_slope_bounds_show_smaller_bounds():
    found = [
        float(tighten_locally(problem(low, high), gap=1e-4)[0])
        for low, high in ((0.0, 1.0), (0.0, 0.5), (0.0, 0.25))
    ]
    assert found[0] > 1.02 * found[1] > 1.02 * found[2]


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_no_slopes_within_the_bounds_move_the_output_further(slope):
    local = problem(0.25, 0.75)
    gamma = float(tighten_locally(local, gap=1e-4)[0])
    S = torch.diag(0.25 + 0.5 * slope * torch.ones(6).double())
    J = local.C[0] @ torch.linalg.solve(torch.eye(6) - S @ local.W, S @ local.U[0])
    assert float(torch.linalg.matrix_norm(J, 2)) <= gamma


def test_the_program_of_z_tilde_has_the_same_outputs():
    """z̃ = sv with s in [0, 1] is z = (low + (high − low)s)v."""
    local, s = problem(0.25, 0.75), torch.rand(6, dtype=torch.float64)
    program, eye = local.transform(), torch.eye(6, dtype=torch.float64)
    x = torch.randn(5, dtype=torch.float64)
    tilde = torch.linalg.solve(eye - s[:, None] * program.W[0], s * (program.U[0] @ x))
    slope = 0.25 + 0.5 * s
    z = torch.linalg.solve(eye - slope[:, None] * local.W, slope * (local.U[0] @ x))
    torch.testing.assert_close(program.C[0] @ tilde + program.D[0] @ x, local.C[0] @ z)


def test_a_target_is_returned_where_it_is_reached():
    local = problem(0.0, 1.0)
    target = torch.full((1,), 50.0, dtype=torch.float64)
    assert tighten_locally(local, target=target)[0].tolist() == [50.0]


def test_inputs_that_cannot_move_lower_the_bound():
    local = problem(0.0, 1.0, q=1)
    target = torch.full((1,), 1e-2, dtype=torch.float64)
    bound = {}
    for slack in (0.0, float("inf")):
        box_slack = torch.full((1, 2, 5), slack, dtype=torch.float64)
        bound[slack] = float(tighten_with_constraints(local, [], box_slack, target)[0])
    assert bound[0.0] < 0.7 * bound[float("inf")]
