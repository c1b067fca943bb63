"""A false claim around one input is refused; compressed inputs reach all that inputs reach."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lben import CertificateError, EquilibriumLinear
from lben.certificates.local import LocalClaim, compress_inputs, prove_local_claim
from lben.rigorous import Enclosure
from lben.tightening.local import LocalProgram, tighten_locally, widen_slope_bounds


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_compressed_inputs_reach_what_all_inputs_reach(shape):
    A = torch.randn(shape, dtype=torch.float64).numpy()
    A[0] *= 1e6
    R = compress_inputs(A)
    assert R.shape == (shape[0], shape[0])
    excess = np.linalg.eigvalsh(np.linalg.pinv(R) @ A @ A.T @ np.linalg.pinv(R).T)
    assert excess.max() <= 1 + 1e-9
    assert excess.max() > 1 - 1e-3
    assert not compress_inputs(np.zeros(shape)).any()


def test_a_false_local_claim_is_refused():
    """γ below the gain of the linear map that remains when every unit is fixed."""
    torch.manual_seed(0)
    weights = EquilibriumLinear(5, 6, 2, gamma=3.0, dtype=torch.float64).weights().to(torch.float64)
    low, high = widen_slope_bounds(
        *(torch.full((1, 6), s, dtype=torch.float64) for s in (1.0, 1.0))
    )
    matrices = (weights.W, weights.U[None], weights.C[None], weights.C.new_zeros(1, 2, 5))
    W, U, C, D = matrices
    problem = LocalProgram(W=W, U=U, C=C, D=D, Lambda=weights.Lambda, low=low, high=high)
    gamma, multiplier = tighten_locally(problem, gap=1e-3)
    slope = torch.eye(6, dtype=torch.float64)
    J = weights.C @ torch.linalg.solve(slope - weights.W, weights.U)
    exact = float(torch.linalg.matrix_norm(J, 2))
    assert exact <= float(gamma) <= exact * 1.01

    def proved(factor, **changes):
        claim = LocalClaim(
            gamma=float(gamma) * factor, Lambda=multiplier[0].numpy(), low=low[0].numpy(),
            high=high[0].numpy(),
        )  # fmt: skip
        W, U, C, D = (t.reshape(t.shape[-2:]).numpy() for t in matrices)
        claim = dataclasses.replace(claim, **changes)
        return prove_local_claim(W, U, Enclosure(C), Enclosure(D), claim) > 0

    assert proved(1.0)
    assert not proved(0.98)
    assert not proved(1.0, low=0 * low[0].numpy())  # the multiplier is that of other slopes
    assert not proved(1.0, Lambda=-multiplier[0].numpy())
    assert not proved(1.0, Lambda=np.full(6, np.nan))


def test_rows_too_small_to_be_reduced_are_refused():
    with pytest.raises(CertificateError, match="denormal"):
        compress_inputs(np.array([[1e-310, 0.0], [1.0, 0.0]]))
    with pytest.raises(CertificateError, match="not finite"):
        compress_inputs(np.array([[math.inf, 0.0]]))
    large = compress_inputs(np.array([[1e200, 0.0], [0.0, 1e-200]]))
    assert np.isfinite(large).all()


def test_a_local_claim_needs_slopes_between_zero_and_one():
    one = np.ones(1)
    W, U = np.zeros((1, 1)), np.ones((1, 1))

    def holds(**values):
        claim = {"gamma": 1.1, "Lambda": one, "low": 0 * one, "high": one, **values}
        return prove_local_claim(W, U, Enclosure(U), Enclosure(W), LocalClaim(**claim)) > 0

    assert holds()
    for bad in ({"low": one, "high": 0 * one}, {"high": 2 * one}, {"low": -one},
                {"low": math.nan * one}, {"high": math.nan * one}, {"gamma": math.nan},
                {"gamma": math.inf}, {"gamma": -1.0}, {"Lambda": math.inf * one}):  # fmt: skip
        assert not holds(**bad)
    with pytest.raises(ValueError, match="must have shape"):
        holds(low=np.zeros(2))
