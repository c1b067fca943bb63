"""Outputs that differ by more than rounding are found, whatever the fault of a converter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.lipschitz.faults import FAULTS, SHAPE, build_model, planted
from lben.interop import ConversionError, compare_outputs, from_torch
from lben.interop.rounding import RoundingModel
from lben.weights.network import Network


@pytest.fixture
def model():
    return build_model()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught(fault, model):
    assert isinstance(from_torch(model, SHAPE), Network)
    with planted(fault), pytest.raises(ConversionError, match="computes something else"):
        from_torch(model, SHAPE)


@pytest.mark.parametrize("relative", [1e-6, 1e-9])
def test_a_change_of_one_number_is_found(relative, model):
    network = from_torch(model, SHAPE)
    matrices = {j: m.copy() for j, m in network.output.matrices.items()}
    last = max(matrices)
    matrices[last][0] *= 1 + relative
    changed = replace(network, output=replace(network.output, matrices=matrices))
    with pytest.raises(ConversionError, match="differ by"):
        compare_outputs(model, changed)


def test_a_fault_is_found_where_the_proved_rounding_is_large():
    layers = [part for _ in range(60) for part in (nn.Linear(16, 16), nn.ReLU())]
    deep = nn.Sequential(*layers, nn.Linear(16, 3)).eval()
    with torch.no_grad():
        for layer in deep[::2]:
            layer.weight.mul_(4)
    network = from_torch(deep, (16,))
    error, size = (getattr(RoundingModel(network).evaluate(np.ones((1, 16))), name)[0]
                   for name in ("error", "size"))  # fmt: skip
    assert error > size
    first = network.blocks[0]
    affine = replace(first.affine, bias=first.affine.bias * 1.001)
    changed = replace(network, blocks=(replace(first, affine=affine), *network.blocks[1:]))
    with pytest.raises(ConversionError, match="differ by"):
        compare_outputs(deep, changed)


def test_outputs_of_functions_and_of_other_shapes_are_compared(model):
    network = from_torch(model, SHAPE)

    def run(x):
        with torch.no_grad():
            return model(torch.from_numpy(x).float()).numpy()

    assert compare_outputs(run, network).share <= 1
    with pytest.raises(ConversionError, match="outputs of shape"):
        compare_outputs(lambda x: run(x)[:, :2], network)


def test_outputs_that_are_not_numbers_are_refused(model):
    network = from_torch(model, SHAPE)
    with pytest.raises(ConversionError, match="differ by inf"):
        compare_outputs(lambda x: np.full((len(x), 3), np.nan, dtype=np.float32), network)
