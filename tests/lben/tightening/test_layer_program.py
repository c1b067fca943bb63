"""The interior-point method closes its gap, and ends where a target or the limit is."""

import pytest
import torch

from lben import EquilibriumLinear
from lben.tightening.layer_program import LayerProgram, find_feasible_point, minimise_bound


def dense(gamma=2.0, features=(6, 9, 4)):
    layer = EquilibriumLinear(*features, gamma=gamma, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        return layer.weights()


def test_the_interior_point_method_closes_its_gap():
    weights = dense()
    program = LayerProgram(
        W=weights.W[None], U=weights.U[None], C=weights.C[None], D=weights.C.new_zeros(1, 4, 6)
    )
    rough, fine = (minimise_bound(program, weights.Lambda[None], gap=g) for g in (1e-2, 1e-8))
    assert float(fine.gap) <= 1e-8 < float(rough.gap) <= 1e-2
    assert float(fine.tau) <= float(rough.tau) <= float(fine.tau) * (1 + float(rough.gap))
    early = minimise_bound(program, weights.Lambda[None], gap=1e-8, max_steps=2)
    assert bool(fine.converged)
    assert not bool(early.converged)
    assert float(early.tau) * (1 - float(early.gap)) <= float(fine.tau) < float(early.tau)


def test_a_number_per_input_bounds_the_largest_norm():
    """‖y − y'‖₂ ≤ √Στ ‖x − x'‖_∞, attacked at corners."""
    weights = dense(features=(5, 7, 1))
    program = LayerProgram(
        W=weights.W[None], U=weights.U[None], C=weights.C[None], D=weights.C.new_zeros(1, 1, 5),
        per_input=True,
    )  # fmt: skip
    bound = float(minimise_bound(program, weights.Lambda[None], gap=1e-6).tau.sum().sqrt())
    largest = 0.0
    for _ in range(300):
        slope = torch.diag((torch.rand(7) > 0.5).double())
        J = weights.C @ torch.linalg.solve(torch.eye(7) - slope @ weights.W, slope @ weights.U)
        largest = max(largest, float(J.abs().sum()))
    assert largest <= bound <= 3 * largest


def program_of(weights, count=1):
    def repeat(t):
        return t.expand(count, *t.shape)

    q, p = weights.out_features, weights.in_features
    return LayerProgram(
        W=repeat(weights.W), U=repeat(weights.U), C=repeat(weights.C),
        D=weights.C.new_zeros(count, q, p),
    )  # fmt: skip


def test_a_start_is_strictly_feasible():
    weights = dense()
    program = program_of(weights)
    standard = program.to_standard_form()
    S = standard.constant + standard.assemble(find_feasible_point(program, weights.Lambda[None]))
    assert float(torch.linalg.eigvalsh(S)[0, 0]) > 0
    with pytest.raises(ValueError, match="not positive definite"):
        find_feasible_point(program, -weights.Lambda[None])


def test_a_target_ends_a_program_that_reaches_it_and_one_that_cannot():
    weights = dense()
    program, start = program_of(weights, 2), weights.Lambda.expand(2, -1)
    best = float(minimise_bound(program, start, gap=1e-8).tau[0])
    target = torch.tensor([1.3 * best, 0.5 * best], dtype=torch.float64)
    optimum = minimise_bound(program, start, gap=1e-8, target=target)
    reached, out_of_reach = optimum.tau[:, 0].tolist()
    assert reached <= 1.3 * best
    assert out_of_reach * (1 - float(optimum.gap[1])) > 0.5 * best
    assert bool((optimum.gap > 1e-8).all())


def test_units_that_nothing_moves_have_finite_multipliers():
    """The last unit depends on no input: every large enough multiple of its λ is feasible."""
    eye = torch.eye(3, dtype=torch.float64)[None]
    program = LayerProgram(
        W=0 * eye, U=eye * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), C=eye, D=0 * eye
    )
    found = minimise_bound(program, torch.ones(1, 3, dtype=torch.float64), gap=1e-6)
    assert 4 <= float(found.tau) <= 4 * (1 + 1e-6)
    assert bool(found.converged)
    assert bool(found.multiplier.isfinite().all())


def test_fewer_inputs_have_the_same_optimum():
    weights = dense(features=(30, 4, 2))
    program = program_of(weights)
    assert program.reduce_inputs().U.shape == (1, 4, 6)
    wide = LayerProgram(W=program.W, U=program.U, C=program.C, D=program.D, per_input=True)
    assert wide.reduce_inputs().U.shape == (1, 4, 30)
