"""Every layer with a strict certificate is reached, at ‖D‖ = γ too, and every value certifies."""

import dataclasses
import math

import pytest
import torch

from lben import CertificateError, certify
from lben.parameterizations import CompleteParameterization, DirectParameterization


def layer(gamma=2.0, feedthrough=True):
    free = DirectParameterization(
        5, 6, 3, gamma=gamma, feedthrough=feedthrough, epsilon=0.05, dtype=torch.float64
    )
    with torch.no_grad():
        for p in free.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        return free()


@pytest.mark.parametrize("gamma", [0.05, 2.0, 30.0])
@pytest.mark.parametrize("feedthrough", [False, True])
def test_it_starts_at_the_weights_it_is_given(gamma, feedthrough):
    weights = layer(gamma, feedthrough)
    found = CompleteParameterization(weights)().tensors()
    for name, value in weights.tensors().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * gamma)


def test_every_value_of_the_free_tensors_is_certified_and_a_smaller_bound_is_not():
    free = CompleteParameterization(layer())
    with torch.no_grad():
        for p in free.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)
    weights = free()
    assert certify(weights).bound == 2.0
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(dataclasses.replace(weights, gamma=0.3))


def test_the_feedthrough_comes_nearer_to_gamma_than_any_of_the_direct_one():
    free = CompleteParameterization(layer())
    with torch.no_grad():
        free.F[: len(free.C)] *= 1e4
    D = free().D.detach()
    assert float(torch.linalg.svdvals(D)[0]) > 2 * (1 - 1e-6)
    assert certify(free()).bound == 2.0


def test_weights_without_a_strict_certificate_are_refused():
    weights = layer()
    with pytest.raises(ValueError, match="claim no bound"):
        CompleteParameterization(dataclasses.replace(weights, gamma=None))
    with pytest.raises(ValueError, match="must be below gamma"):
        CompleteParameterization(dataclasses.replace(weights, D=9 * torch.ones_like(weights.D)))
    tight = dataclasses.replace(weights, W=weights.W + torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="do not satisfy the certificate strictly"):
        CompleteParameterization(tight)
    assert math.isfinite(CompleteParameterization(weights).epsilon)
