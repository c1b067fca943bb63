"""States of equilibria stay where they are proved to stay."""

import dataclasses
import math

import pytest
import torch

from lben.certificates import states
from lben.certificates.certificate import CertificateError
from lben.certificates.relaxation import InputRegion
from lben.certificates.states import StateBound
from lben.weights.activation import RELU
from lben.weights.affine_system import AffineSystem
from tests.lben.certificates.test_relaxation import BUMP, SETS, chain, sample
from tests.lben.weights.test_affine_system import TANH, equilibrium


@pytest.mark.parametrize(("norm", "box"), SETS)
@pytest.mark.parametrize("activation", [RELU, TANH], ids=lambda a: a.name)
@pytest.mark.parametrize("radius", [1e-8, 0.3])
def test_no_state_leaves_its_bounds(norm, box, activation, radius):
    system = AffineSystem.of_weights(equilibrium(), activation, 0.1307, 0.3081)
    region = InputRegion.around(torch.rand(1, 3), radius, norm, box)
    reached = system.evaluate(sample(region))[0]
    middle = system.evaluate(region.center)[0]
    for v in (middle, middle + 0.1, torch.full_like(middle, math.nan)):
        found = StateBound(system).prove(region, v)
        assert (found.lower[1] <= reached + 1e-13).all()
        assert (found.upper[1] >= reached - 1e-13).all()
    assert ((found.upper[1] - found.lower[1]).isfinite()).all()


def test_small_sets_have_states_near_each_other():
    system = AffineSystem.of_weights(equilibrium(), RELU)
    region = InputRegion.around(torch.rand(1, 3), 1e-9, "l2", None)
    found = StateBound(system).prove(region, system.evaluate(region.center)[0])
    assert (found.upper[1] - found.lower[1]).max() < 1e-6


def test_a_bound_of_m_that_is_too_large_is_found(monkeypatch):
    system = AffineSystem.of_weights(equilibrium(n=1, p=1), RELU)
    region = InputRegion.around(torch.full((1, 1), 0.5), 0.5, "l2", None)
    reached = system.evaluate(sample(region))[0]

    def inside() -> bool:
        found = StateBound(system).prove(region, system.evaluate(region.center)[0])
        return bool((found.lower[1] <= reached).all() and (found.upper[1] >= reached).all())

    assert inside()
    right = states.smallest_eigenvalue_bound
    monkeypatch.setattr(states, "smallest_eigenvalue_bound", lambda H: 1e3 * right(H))
    monkeypatch.setattr(states, "norms_up", lambda values, axis: values.sum(axis) * 0)
    assert not inside()


def test_other_systems_are_refused():
    with pytest.raises(ValueError, match="feed-forward"):
        StateBound(AffineSystem.of_network(chain()))
    with pytest.raises(CertificateError, match="slopes in"):
        StateBound(AffineSystem.of_weights(equilibrium(), BUMP))
    weights = equilibrium()
    unstable = dataclasses.replace(weights, W=weights.W + 9 * torch.eye(6))
    with pytest.raises(CertificateError, match="not proved to be monotone"):
        StateBound(AffineSystem.of_weights(unstable, RELU))
    negative = dataclasses.replace(weights, Lambda=-weights.Lambda)
    with pytest.raises(CertificateError, match="must be positive"):
        StateBound(AffineSystem.of_weights(negative, RELU))
