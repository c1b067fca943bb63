"""Descent stays within its set, and comes near the least value."""

import pytest
import torch

from lben.certificates.relaxation import InputRegion
from lben.tightening.descent import find_smallest
from lben.weights.activation import RELU
from lben.weights.affine_system import AffineSystem
from tests.lben.certificates.test_relaxation import SETS, chain, sample
from tests.lben.weights.test_affine_system import TANH, equilibrium


@pytest.mark.parametrize(("norm", "box"), SETS)
@pytest.mark.parametrize("kind", ["chain", "tanh", "equilibrium"])
def test_descent_beats_random_inputs_by_its_gradients(norm, box, kind, monkeypatch):
    system = {
        "chain": lambda: AffineSystem.of_network(chain(), 0.1307, 0.3081),
        "tanh": lambda: AffineSystem.of_network(chain(activation=TANH)),
        "equilibrium": lambda: AffineSystem.of_weights(equilibrium(), RELU),
    }[kind]()
    region = InputRegion.around(torch.rand(1, system.inputs), 0.2, norm, box)
    target = torch.zeros(1, system.units(system.output)).double()
    target[0, :2] = torch.tensor([1.0, -1.0])
    met = []
    evaluate = AffineSystem.evaluate

    def watch(self, inputs):
        met.append(inputs)
        return evaluate(self, inputs)

    reached = (system.evaluate(sample(region, 500))[-1] @ target[0]).min()
    here = (system.evaluate(region.center)[-1] @ target[0])[0]
    monkeypatch.setattr(AffineSystem, "evaluate", watch)
    found = find_smallest(system, target, region)[0]
    assert found <= reached + 0.05 * (here - reached)
    for inputs in met:
        move = inputs - region.center
        assert (move >= region.lower - 1e-12).all()
        assert (move <= region.upper + 1e-12).all()
        assert (move.norm(dim=1) <= region.radius + 1e-12).all()
