"""Tighter bounds are proved, never below what an attack finds, and never above the product."""

import dataclasses
from functools import reduce

import cvxpy
import pytest
import torch

from lben import (
    CertificateError,
    Claim,
    DenseWeights,
    EquilibriumLinear,
    SandwichLinear,
    SLLLinear,
    certify,
    stack,
    tighten_diagonal,
    tighten_pairs,
)


def draw_report(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return layer.double().weights()


def jacobian_norms(weights, samples=200):
    """Norms of Jacobians of the assembled explicit network at random points."""
    W, U = weights.W, weights.U
    norms = []
    for _ in range(samples):
        slope = torch.diag((torch.rand(len(W), dtype=W.dtype) > 0.5).to(W.dtype))
        inner = torch.linalg.solve(torch.eye(len(W), dtype=W.dtype) - slope @ W, slope @ U)
        J = weights.C @ inner + (0 if weights.D is None else weights.D)
        norms.append(float(torch.linalg.matrix_norm(J, 2)))
    return max(norms)


def test_a_joint_bound_beats_the_product_and_holds():
    weights = reduce(stack, [draw_report(SandwichLinear(8, 8)) for _ in range(4)])
    joint = certify(weights, tighten_diagonal(weights)).bound
    assert jacobian_norms(weights) <= joint < 0.97 * weights.gamma


def test_an_equilibrium_layer_is_tightened_too():
    torch.manual_seed(2)
    with torch.no_grad():
        weights = EquilibriumLinear(6, 9, 4, gamma=2.0, dtype=torch.float64).weights()
    W, U, C = weights.W, weights.U, 0.6 * weights.C
    loose = DenseWeights(W=W, U=U, b=weights.b, C=C, D=None, b_y=weights.b_y,
                            Lambda=weights.Lambda, gamma=2.0)  # fmt: skip
    assert certify(loose, tighten_diagonal(loose)).bound < 1.6


def test_a_skip_cannot_be_beaten():
    """All units may be inactive, then y = x: no bound of residual layers is below 1."""
    weights = stack(draw_report(SLLLinear(5, 4)), draw_report(SLLLinear(5, 4)))
    claim = tighten_diagonal(weights)
    assert 1 <= claim.gamma <= weights.gamma
    assert certify(weights, claim).bound == claim.gamma


def dense(gamma=2.0, features=(6, 9, 4), feedthrough=False):
    layer = EquilibriumLinear(*features, gamma=gamma, feedthrough=feedthrough, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        return layer.weights()


def by_clarabel(weights, C, D):
    """The same semidefinite program by a general solver."""
    W, U = weights.W.numpy(), weights.U.numpy()
    n, p = U.shape
    multiplier, square = cvxpy.Variable(n, nonneg=True), cvxpy.Variable()
    Lambda = cvxpy.diag(multiplier)
    side = -(Lambda @ U + C.T @ D).T
    S = 2 * Lambda - Lambda @ W - W.T @ Lambda - C.T @ C
    M = cvxpy.bmat([[square * torch.eye(p).numpy() - D.T @ D, side], [side.T, S]])
    cvxpy.Problem(cvxpy.Minimize(square), [M >> 0]).solve(solver=cvxpy.CLARABEL)
    return float(square.value) ** 0.5


@pytest.mark.parametrize(("gamma", "feedthrough"), [(2.0, False), (2.0, True), (None, False)])
def test_joint_and_pair_bounds_are_those_of_a_general_solver(gamma, feedthrough):
    weights = dense(gamma, feedthrough=feedthrough)
    C, D = weights.C, weights.C.new_zeros(4, 6) if weights.D is None else weights.D
    joint = tighten_diagonal(weights).gamma
    reference = by_clarabel(weights, C.numpy(), D.numpy())
    assert joint == pytest.approx(min(reference, gamma or reference), rel=2e-5)
    assert joint > reference * (1 - 1e-6)
    claims = tighten_pairs(weights)
    for i, j in [(0, 1), (2, 3)]:
        c, d = (t[i : i + 1] - t[j : j + 1] for t in (C, D))
        reference = by_clarabel(weights, c.numpy(), d.numpy())
        assert claims[i, j].gamma == pytest.approx(reference, rel=2e-4)


def test_bounds_of_pairs_are_proved_and_ordered():
    weights = dense()
    whole = certify(weights, tighten_diagonal(weights)).bound
    jointly = torch.tensor(certify(weights, tighten_pairs(weights)))
    stored = torch.tensor(certify(weights, tighten_pairs(weights, fix_multiplier=True)))
    assert bool((jointly <= stored * (1 + 1e-4)).all())
    off = ~torch.eye(4, dtype=torch.bool)
    assert bool((jointly[off] <= 2**0.5 * whole * (1 + 1e-4)).all())
    for i, j in [(0, 1), (1, 3)]:
        difference = dataclasses.replace(
            weights, C=weights.C[i : i + 1] - weights.C[j : j + 1], b_y=weights.b_y[:1]
        )
        assert jacobian_norms(difference) <= jointly[i, j]


def test_a_false_bound_of_a_pair_is_refused():
    weights = dense()
    claims = tighten_pairs(weights, gap=1e-7)
    claim = claims[1, 2]
    claims[1, 2] = Claim(claim.gamma * (1 - 1e-5), claim.Lambda)
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(weights, claims)
    del claims[1, 2]
    with pytest.raises(ValueError, match="outputs 1 and 2"):
        certify(weights, claims)


def test_bad_weights_are_named():
    weights = dense()
    for propose in (tighten_diagonal, tighten_pairs):
        with pytest.raises(CertificateError, match="not positive definite"):
            propose(dataclasses.replace(weights, W=9 * weights.W.abs()))


def test_the_gap_of_a_claim_reaches_down_to_the_optimum():
    """It is that of the claim that is returned, whichever proposal it comes from."""
    layer = EquilibriumLinear(6, 9, 4, gamma=2.0, dtype=torch.float64)
    weights = layer.weights().apply(torch.Tensor.detach)
    best = tighten_diagonal(weights, gap=1e-9)
    rough = tighten_diagonal(weights, gap=0.5)
    assert best.gap < 1e-6 < rough.gap < 0.5
    assert rough.gamma * (1 - rough.gap) <= best.gamma <= rough.gamma
