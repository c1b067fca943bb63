"""Proofs at frequencies are those of the matrices, for pooled read-outs too."""

import dataclasses
import math

import pytest
import torch

from lben import (
    CertificateError,
    Claim,
    certify,
    tighten_pooled,
)
from tests.lben.layers.images import LAYERS, dense, moved, pooled


@pytest.mark.parametrize("name", LAYERS)
def test_the_proof_is_that_of_the_matrices(name):
    layer = moved(name)
    proof = layer.certificate()
    whole = certify(dense(layer))
    assert proof.bound == whole.bound
    assert proof.m <= whole.m * (1 + 1e-6)
    assert proof.L >= whole.L * (1 - 1e-6)
    assert proof.output_gain >= whole.output_gain * (1 - 1e-6)
    assert proof.m > 0.04
    if math.isfinite(proof.bound):
        weights = layer.weights()
        with pytest.raises(CertificateError, match="could not be proved"):
            certify(dataclasses.replace(weights, gamma=0.5 * weights.gamma))


@pytest.mark.parametrize("name", ["pooled", "two scales"])
def test_the_bound_of_the_whole_is_below_the_product(name):
    layer = LAYERS[name]()
    weights = layer.weights()
    state = dataclasses.replace(weights, A=torch.zeros_like(weights.A), gamma=None)
    product = tighten_pooled(state)
    proof = certify(state, product)
    assert proof.bound == product.gamma
    with pytest.raises(CertificateError):
        certify(state, Claim(product.gamma * (1 - 1e-3), product.Lambda))
    with pytest.raises(ValueError, match="claim a bound of their own"):
        tighten_pooled(weights)
    with pytest.raises(ValueError, match="claim no bound"):
        certify(weights, product)


def test_a_rounded_coupling_is_taken_off_the_proof():
    weights = pooled().weights()
    noise = torch.randn_like(weights.A)
    proofs = [
        certify(dataclasses.replace(weights, A=weights.A + scale * noise)) for scale in (0.0, 1e-4)
    ]
    assert 0 < proofs[1].margin < proofs[0].margin
    assert proofs[1].m < proofs[0].m
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(dataclasses.replace(weights, A=weights.A + 0.1 * noise))
