"""Certificates are tied to what they prove, compose upwards, and survive a file."""

import dataclasses
import json
from fractions import Fraction

import pytest
import torch

from lben import (
    CertificateError,
    Normalize,
    certify,
    compose,
)
from tests.lben.certificates.weights import random_weights


def test_a_certificate_is_tied_to_its_weights():
    weights = random_weights()
    certificate = certify(weights)
    certificate.check(weights)
    moved = dataclasses.replace(weights, W=weights.W + 1e-16 * weights.W.abs())
    moved.W[0, 0] = torch.nextafter(moved.W[0, 0], torch.tensor(9.0, dtype=torch.float64))
    with pytest.raises(CertificateError, match="for other weights"):
        certificate.check(moved)


def test_certificates_are_json():
    record = json.loads(compose([certify(random_weights(gamma=None))]).to_json())
    assert record["bound"] is None
    assert record["layers"][0]["m"] > 0


def test_composition_multiplies_upwards():
    certificate = certify(random_weights(gamma=0.1))
    normalisation = Normalize((0.5,), (1 / 3.0,)).certificate()
    network = compose([normalisation, certificate, certificate])
    exact = Fraction(normalisation.bound) * Fraction(certificate.bound) ** 2
    assert exact <= Fraction(network.bound) <= exact * (1 + Fraction(1, 10**14))
    assert network.bound == pytest.approx(0.03, rel=1e-6)
