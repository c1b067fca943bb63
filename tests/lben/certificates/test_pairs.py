"""Bounds of every pair of outputs: proved, attacked, and below that of the whole."""

import math

import pytest
import torch

from lben import CertificateError, Claim, PairCertificate, certify, tighten_pairs
from lben.certificates.pairs import difference
from tests.lben.weights.kinds import KINDS


@pytest.mark.parametrize("kind", ["dense", "dense without D"])
def test_pairs_hold_for_every_pattern_of_slopes(kind):
    w = KINDS[kind]()
    claims = {
        (i, j): Claim(math.sqrt(2.0) * w.gamma * (1 + 1e-9), w.Lambda)
        for i in range(3) for j in range(i + 1, 3)
    }  # fmt: skip
    if w.D is None:
        claims = tighten_pairs(w)
    pairs = certify(w, claims)
    assert isinstance(pairs, PairCertificate)
    assert pairs.margin > 0
    assert pairs.largest == max(c.gamma for c in claims.values())
    best = 0.0
    for _ in range(200):
        slopes = torch.rand(6).round().double()
        K = torch.linalg.solve(torch.eye(6) - slopes[:, None] * w.W, slopes.diag())
        J = w.C @ K @ w.U + (0 if w.D is None else w.D)
        for i, j in claims:
            quotient = float((J[i] - J[j]).norm()) / pairs[i][j]
            assert quotient <= 1
            best = max(best, quotient)
    assert best > 0.2


def test_a_pair_without_a_claim_and_a_false_one_are_refused():
    w = KINDS["dense without D"]()
    claims = dict(tighten_pairs(w))
    claims[0, 1] = Claim(1e-3, w.Lambda)
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(w, claims)
    claims[0, 1] = Claim(None, w.Lambda)
    with pytest.raises(ValueError, match="no bound is claimed for the outputs 0 and 1"):
        certify(w, claims)
    del claims[0, 1]
    with pytest.raises(ValueError, match="no bound is claimed for the outputs 0 and 1"):
        certify(w, claims)


def test_the_difference_of_two_rows_is_enclosed():
    w = KINDS["dense"]()
    block = difference(w, w.Lambda, 0, 2)
    exact = (w.C[0] - w.C[2]).numpy()
    assert (abs(block.C.mid[0] - exact) <= block.C.radius[0] + 1e-300).all()
    assert block.D.mid.shape == (1, 5)
