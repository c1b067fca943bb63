"""Claims are proposals: a record of numbers, proved or refused by certify, never believed."""

import dataclasses

import numpy as np
import pytest
import torch

from lben import CertificateError, Claim, IntervalClaim, LinfClaim, SLLLinear, certify


def test_claims_are_fixed_and_believed_by_nobody():
    weights = SLLLinear(4, 6, dtype=torch.float64).weights()
    claim = Claim(0.5, weights.Lambda)
    with pytest.raises(dataclasses.FrozenInstanceError):
        claim.gamma = 2.0
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(weights, claim)
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(weights, {
            (i, j): LinfClaim(tau=np.full(4, 1e-6), Lambda=weights.Lambda.numpy())
            for i in range(4) for j in range(i + 1, 4)
        })  # fmt: skip


def test_a_claim_of_no_bound_proves_that_there_is_an_equilibrium():
    weights = SLLLinear(4, 6, dtype=torch.float64).weights()
    assert certify(weights, Claim(None, weights.Lambda)).bound == float("inf")


def test_intervals_carry_nothing_to_be_believed():
    assert IntervalClaim() == IntervalClaim()
    assert not dataclasses.fields(IntervalClaim)
