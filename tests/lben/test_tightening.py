"""Tighter bounds are proved, never below what an attack finds, and never above the product."""

from functools import reduce

import pytest
import torch

from lben import (
    CertificateError,
    EquilibriumLinear,
    ExplicitWeights,
    SandwichLinear,
    SLLLinear,
    certify,
    stack,
    tighten_jointly,
)


def drawn(layer):
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
    weights = reduce(stack, [drawn(SandwichLinear(8, 8)) for _ in range(4)])
    joint = certify(weights, tighten_jointly(weights)).bound
    assert jacobian_norms(weights) <= joint < 0.97 * weights.gamma


def test_an_equilibrium_layer_is_tightened_too():
    torch.manual_seed(2)
    with torch.no_grad():
        weights = EquilibriumLinear(6, 9, 4, gamma=2.0, dtype=torch.float64).weights()
    W, U, C = weights.W, weights.U, 0.6 * weights.C
    loose = ExplicitWeights(W=W, U=U, b=weights.b, C=C, D=None, b_y=weights.b_y,
                            Lambda=weights.Lambda, gamma=2.0)  # fmt: skip
    assert certify(loose, tighten_jointly(loose)).bound < 1.6


def test_a_skip_cannot_be_beaten():
    """All units may be inactive, then y = x: no bound of residual layers is below 1."""
    weights = stack(drawn(SLLLinear(5, 4)), drawn(SLLLinear(5, 4)))
    claim = tighten_jointly(weights)
    assert 1 <= claim.gamma <= weights.gamma
    assert certify(weights, claim).bound == claim.gamma


def test_bad_weights_are_named():
    weights = drawn(SandwichLinear(4, 3))
    without = ExplicitWeights(**{**vars(weights), "gamma": None})
    with pytest.raises(ValueError, match="claim none"):
        tighten_jointly(without)
    with pytest.raises(CertificateError, match="does not hold"):
        tighten_jointly(ExplicitWeights(**{**vars(weights), "C": 9 * weights.C}))
