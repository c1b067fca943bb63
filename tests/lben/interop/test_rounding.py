"""The rounding of networks stays below its bound, and the bound is not far."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lben.interop import from_torch
from lben.interop.rounding import RoundingModel
from lben.weights.network import to_dense


def exactly(network, x):
    """Return y of a network of ReLU units with exact numbers, in rational arithmetic."""
    states = [[Fraction(v) for v in x.ravel()]]
    for block in [*network.blocks, None]:
        affine = network.output if block is None else block.affine
        v = [Fraction(b) for b in affine.bias]
        for j, matrix in affine.matrices.items():
            for i, row in enumerate(to_dense(matrix)):
                v[i] += sum(Fraction(w) * z for w, z in zip(row, states[j], strict=True) if w)
        states.append(v if block is None else [max(value, Fraction(0)) for value in v])
    return states[-1]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_errors_in_exact_arithmetic_stay_below_the_bound(scale):
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    network = from_torch(model, (1, 3, 3))
    x = (scale * torch.randn(3, 1, 3, 3)).double().numpy()
    own, single = (RoundingModel(network).evaluate(x, d) for d in (torch.float64, torch.float32))
    with torch.no_grad():
        run = model(torch.from_numpy(x).float()).double().numpy()
    for k, sample in enumerate(x):
        y = exactly(network, sample)
        for value, bound in ((own.value[k], own.error[k]), (run[k], single.error[k])):
            error = sum((Fraction(v) - w) ** 2 for v, w in zip(value, y, strict=True))
            assert error <= Fraction(bound) ** 2
            assert Fraction(bound) ** 2 <= 10**8 * error + Fraction(1, 10**40)


def test_the_bound_grows_with_the_distance():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    network = from_torch(model, (4,))
    x, far = np.zeros((1, 4)), np.full((1, 4), 500.0)
    at, there = RoundingModel(network).evaluate(x), RoundingModel(network).evaluate(far)
    assert there.error[0] <= at.error[0] + 1000.0 * at.slope


def test_a_deep_chain_has_a_small_bound():
    layers = [part for _ in range(40) for part in (nn.Linear(16, 16), nn.ReLU())]
    network = from_torch(nn.Sequential(*layers).eval(), (16,))
    found = RoundingModel(network).evaluate(np.ones((1, 16)))
    assert found.error[0] < 1e-11
