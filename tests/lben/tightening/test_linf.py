"""Bounds for inputs measured in linf: ordered, in any unit, and near zero for constants."""

import dataclasses

import pytest
import torch

from lben import CertificateError, EquilibriumLinear, tighten_pairs
from lben.tightening import tighten_linf


def dense(feedthrough=False):
    layer = EquilibriumLinear(5, 6, 3, gamma=2.0, feedthrough=feedthrough, dtype=torch.float64)
    with torch.no_grad():
        return layer.weights()


def bounds(claims):
    return torch.tensor([float(c.tau.sum() ** 0.5) for c in claims.values()])


@pytest.mark.parametrize("feedthrough", [False, True])
def test_a_program_per_pair_is_never_worse(feedthrough):
    weights = dense(feedthrough)
    fixed, best = (bounds(tighten_linf(weights, fix_multiplier=fix)) for fix in (True, False))
    assert bool((best <= fixed).all())
    in_l2 = torch.tensor([c.gamma for c in tighten_pairs(weights).values()])
    assert bool((best <= 5**0.5 * in_l2 * (1 + 1e-6)).all())


def test_the_unit_of_the_outputs_is_that_of_the_bounds():
    weights = dataclasses.replace(dense(), gamma=None)
    larger = dataclasses.replace(weights, C=2.0**60 * weights.C)
    torch.testing.assert_close(
        bounds(tighten_linf(larger)), 2.0**60 * bounds(tighten_linf(weights)), rtol=1e-5, atol=0
    )


def test_outputs_that_are_constant_have_next_to_no_bound():
    weights = dataclasses.replace(dense(), gamma=None)
    still = dataclasses.replace(weights, C=0 * weights.C)
    assert float(bounds(tighten_linf(still)).max()) < 1e-100
    assert float(bounds(tighten_linf(weights)).min()) > 1e-2


def test_weights_that_are_not_well_posed_are_refused():
    weights = dense()
    with pytest.raises(CertificateError, match="not positive definite"):
        tighten_linf(dataclasses.replace(weights, W=9 * weights.W.abs()))
