"""Heads know how far every pair of logits can part."""

import math

import pytest
import torch

from lben import (
    NormalizedLinear,
)


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
