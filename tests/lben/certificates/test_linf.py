"""Bounds in the l∞ norm: proved, attacked at corners, and not far from what attacks find."""

import dataclasses

import numpy as np
import pytest
import torch

from lben import (
    CertificateError,
    DenseWeights,
    EquilibriumLinear,
    IntervalClaim,
    certify,
    tighten_linf,
)
from lben.certificates import LinfClaim


def weights(feedthrough=False, scale=0.3, gamma=2.0):
    torch.manual_seed(0)
    layer = EquilibriumLinear(6, 9, 3, gamma=gamma, feedthrough=feedthrough, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
        return layer.weights()


def found(w, i, j, samples=4000):
    """The largest Σₖ |∂(yᵢ − yⱼ)/∂xₖ| over random slopes."""
    slope = (torch.rand(samples, len(w.W)) > 0.5).double()
    inner = torch.linalg.solve(
        torch.eye(len(w.W)).double() - slope[:, :, None] * w.W, slope[:, :, None] * w.U
    )
    gradient = (w.C[i] - w.C[j]) @ inner
    if w.D is not None:
        gradient = gradient + w.D[i] - w.D[j]
    return float(gradient.abs().sum(-1).max())


@pytest.mark.parametrize("feedthrough", [False, True])
def test_bounds_hold_and_are_not_far_off(feedthrough):
    w = weights(feedthrough)
    stored = certify(w, tighten_linf(w))
    best = certify(w, tighten_linf(w, fix_multiplier=False))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        least = found(w, i, j)
        assert least <= best[i][j] <= stored[i][j] * (1 + 1e-3)
        assert best[i][j] <= 2.5 * least
        assert best[i][j] <= 6**0.5 * 2**0.5 * w.gamma * (1 + 1e-3)  # from the l2 bound


def test_bounds_beyond_all_numbers_are_one_sentence_with_the_next_step():
    w = weights()
    huge = dataclasses.replace(w, U=1e100 * w.U, C=1e100 * w.C, gamma=None)
    message = "the bound of the outputs 0 and 1 in the l∞ norm leaves the range of float64: .*"
    with pytest.raises(CertificateError, match=message + "scale the weights") as caught:
        tighten_linf(huge)
    assert "\n" not in str(caught.value)
    claims = tighten_linf(w)
    claims[0, 1] = LinfClaim(tau=np.full(6, np.inf), Lambda=claims[0, 1].Lambda)
    with pytest.raises(CertificateError, match="τ must be positive and finite") as caught:
        certify(w, claims)
    assert "\n" not in str(caught.value)


def test_intervals_hold_where_there_is_a_bound():
    w = weights(scale=0.05, gamma=None)
    w = dataclasses.replace(w, W=0.3 * w.W - 0.5 * torch.eye(9).double())
    bounds = certify(w, IntervalClaim())
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert found(w, i, j) <= bounds[i][j] <= 10 * found(w, i, j)
    wild = dataclasses.replace(w, W=-2 * torch.ones(9, 9).double())
    assert certify(wild, IntervalClaim())[0][1] == float("inf")


def test_false_claims_are_refused():
    w = weights()
    claims = tighten_linf(w, fix_multiplier=False, gap=1e-6)
    claim = claims[0, 1]
    claims[0, 1] = dataclasses.replace(claim, tau=claim.tau * (1 - 1e-3))
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(w, claims)
    del claims[0, 1]
    with pytest.raises(ValueError, match="outputs 0 and 1"):
        certify(w, claims)
    with pytest.raises(CertificateError, match="not positive definite"):
        tighten_linf(dataclasses.replace(w, W=9 * w.W.abs()))


def test_claims_of_another_size_are_refused():
    """One τ for all inputs would show the l2 bound, which is the smaller one."""
    eye = torch.eye(2, dtype=torch.float64)
    weights = DenseWeights(
        W=0 * eye, U=eye, b=0 * eye[0], C=torch.tensor([[0.0, 0.0], [4.0, 4.0]]).double(),
        D=None, b_y=0 * eye[0], Lambda=eye[0] + eye[1], gamma=None,
    )  # fmt: skip
    claim = LinfClaim(tau=np.full(2, 32.1), Lambda=np.full(2, 32.0))
    assert 8 <= certify(weights, {(0, 1): claim})[0][1] < 8.02
    for change in ({"tau": np.full(1, 32.1)}, {"Lambda": np.full(1, 32.0)}):
        with pytest.raises(ValueError, match="a claim needs"):
            certify(weights, {(0, 1): dataclasses.replace(claim, **change)})
