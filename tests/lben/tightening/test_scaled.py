"""The layer's own Λ times a factor: the least γ, in any unit, without a feed-through."""

import dataclasses

import pytest
import torch

from lben import CertificateError, Claim, EquilibriumLinear, certify, tighten_scaled
from lben.tightening.scaled import ScaledMultiplier, choose_least_claim, lacks_feedthrough


def dense(feedthrough=False, gamma=2.0):
    layer = EquilibriumLinear(5, 6, 3, gamma=gamma, feedthrough=feedthrough, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        return layer.weights()


def test_no_other_factor_shows_less():
    weights = dense()
    claim = tighten_scaled(weights)
    assert certify(weights, claim).bound == claim.gamma < weights.gamma
    for factor in (0.9, 0.99, 1.01, 1.1):
        with pytest.raises(CertificateError, match="could not be proved"):
            certify(weights, Claim(claim.gamma * (1 - 1e-5), claim.Lambda * factor))


def test_outputs_in_another_unit_have_the_bound_in_that_unit():
    scaled = ScaledMultiplier.of(dense())
    C = torch.randn(2, 6, dtype=torch.float64).numpy()
    assert scaled.propose(1e90 * C).gamma == pytest.approx(1e90 * scaled.propose(C).gamma)


def test_the_weights_own_claim_is_taken_where_it_is_less_and_holds():
    weights = dense()
    loose = Claim(5.0, weights.Lambda)
    assert choose_least_claim(weights, [loose]).gamma == weights.gamma
    false = dataclasses.replace(weights, gamma=1e-3)
    assert choose_least_claim(false, [loose]).gamma == 5.0


def test_feedthrough_is_refused_with_the_next_step():
    weights = dense(feedthrough=True)
    assert not lacks_feedthrough(weights)
    assert lacks_feedthrough(dataclasses.replace(weights, D=0 * weights.D))
    with pytest.raises(ValueError, match="use tighten_diagonal"):
        tighten_scaled(weights)
