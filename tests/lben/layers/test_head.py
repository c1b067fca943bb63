"""Heads know how far every pair of logits can part."""

import math

import pytest
import torch

from lben import CertificateError, NormalizedLinear


@pytest.mark.parametrize("kind", ["rows", "orthonormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_bound_pairs_of_logits(kind, dtype):
    head = NormalizedLinear(20, 5, kind=kind, dtype=dtype)
    bounds, Q = head.pair_certificate().tensor(), head.matrix().detach().double()
    exact = (Q[:, None] - Q[None]).norm(dim=2)
    off = ~torch.eye(5, dtype=torch.bool)
    assert (bounds[off] >= exact[off]).all()
    assert (bounds[off] <= exact[off] * (1 + 1e-12)).all()
    if kind == "orthonormal":
        torch.testing.assert_close(bounds[off], torch.full((20,), math.sqrt(2.0)).double())
    assert head.certificate().bound >= float(torch.linalg.matrix_norm(Q, 2))
    x = torch.randn(30, 20, dtype=dtype)
    error = (head(x).double() - (x.double() @ Q.T + head.bias.double())).norm(dim=1)
    assert (error <= head.rounding(x).double()).all()


def test_a_head_claims_nothing_of_numbers_that_are_none():
    head = NormalizedLinear(3, 2)
    with torch.no_grad():
        head.weight[0, 0] = math.nan
    for claim in (head.weights, head.certificate, head.pair_certificate):
        with pytest.raises(ValueError, match="NaN or Inf"):
            claim()


@torch.no_grad()
def test_the_largest_difference_of_two_logits_is_reached():
    head = NormalizedLinear(6, 4, dtype=torch.float64)
    pairs, Q = head.pair_certificate(), head.matrix()
    assert pairs.fingerprint == head.weights().fingerprint == head.certificate().fingerprint
    for i in range(4):
        for j in range(4):
            if i != j:
                step = (Q[i] - Q[j]) / (Q[i] - Q[j]).norm()
                change = head(step[None]) - head(torch.zeros(1, 6, dtype=torch.float64))
                quotient = float(change[0, i] - change[0, j]) / pairs[i][j]
                assert 1 - 1e-9 < quotient <= 1 + 1e-12


def test_a_certificate_is_of_the_head_as_it_is():
    head = NormalizedLinear(6, 4)
    proof, x = head.certificate(), torch.randn(2, 3, 6)
    assert head.forward_with_error(x, proof).error.shape == (2, 3)
    with torch.no_grad():
        head.bias[0] += 1
    with pytest.raises(CertificateError, match="other weights"):
        head.forward_with_error(x, proof)
