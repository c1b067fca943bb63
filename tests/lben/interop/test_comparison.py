"""Outputs that differ by more than rounding are found, whatever the fault of a converter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lben.interop import ConversionError, compare_outputs, from_torch, operations, pytorch
from lben.interop.rounding import RoundingModel
from lben.weights.network import Network


class Model(nn.Module):
    """All that the faults below break."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(36, 3)
        self.prelu = nn.PReLU(4)

    def forward(self, x):
        x = nn.functional.leaky_relu(self.norm(self.conv(x)), 0.1)
        x = x + torch.tanh(self.inner(x))
        x = self.prelu(nn.functional.avg_pool2d(x, 2, 1, 0))
        return self.last(nn.functional.max_pool2d(x, 2, 1, 1).flatten(1)[:, :36])


@pytest.fixture
def model():
    made = Model()
    with torch.no_grad():
        made.prelu.weight.uniform_(-0.5, 0.5)
    made.norm.running_mean.uniform_(-1, 1)
    made.norm.running_var.uniform_(0.5, 2)
    return made.eval()


def wrap(change):
    """Return a fault: a function with its arguments changed."""
    return lambda function: lambda x, *args, **options: function(x, *change(*args), **options)


def pad_on_one_side(function):
    def slide(size, kernel, padding=(0, 0), **options):
        padding = (0, sum(padding)) if kernel == 3 else padding
        return function(size, kernel, padding=padding, **options)

    return slide


def move_the_last_window(function):
    def slide(size, kernel, **options):
        places = function(size, kernel, **options)
        if options.get("stride") == 2:
            places[-1] = places[-2]
        return places

    return slide


def flatten_channels_last(function):
    def read(places, total, batch):
        found = function(places, total, batch)
        return found.reshape(4, -1).T.ravel() if found.ndim == 1 and found.size == 100 else found

    return read


CONVOLUTION, LINEAR = (operations, "convolve"), (operations, "apply_linear")
FAULTS = {
    "transposed kernel": (
        CONVOLUTION, wrap(lambda w, b, axes, g: (np.swapaxes(w, 2, 3), b, axes, g)),
    ),
    "flipped kernel": (CONVOLUTION, wrap(lambda w, b, axes, g: (w[:, :, ::-1, ::-1], b, axes, g))),
    "dropped bias": (LINEAR, wrap(lambda w, b: (w, None))),
    "wrong padding": ((pytorch, "slide"), pad_on_one_side),
    "normalised twice": (
        (operations, "normalize"), lambda f: lambda x, *a: f(f(x, *a), *a),
    ),
    "wrong sector": (
        (pytorch.activation, "make_leaky_relu"), lambda f: lambda slope: f(-slope),
    ),
    "wrong slope": (
        (pytorch.activation, "make_leaky_relu"), lambda f: lambda slope: f(slope + 1e-6),
    ),
    "wrong flatten order": ((pytorch, "read_places"), flatten_channels_last),
    "wrong stride": ((pytorch, "slide"), move_the_last_window),
    "dropped residual": ((operations, "add"), lambda f: lambda x, y: y),
    "wrong groups": (
        CONVOLUTION,
        wrap(lambda w, b, axes, g: (w if g == 1 else w[[1, 0, 2, 3]], b, axes, g)),
    ),
    "wrong eps": (
        (operations, "normalize"), wrap(lambda m, v, w, b, eps: (m, v, w, b, 10 * eps)),
    ),
    "mean of a window of another size": (
        (operations, "average"), wrap(lambda axes, divisors: (axes, divisors + 1)),
    ),
    "slopes of other channels": (
        (operations, "apply_prelu"), wrap(lambda slopes: (slopes[::-1],)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught(fault, model, monkeypatch):
    (place, name), plant = FAULTS[fault]
    assert isinstance(from_torch(model, (2, 9, 9)), Network)
    monkeypatch.setattr(place, name, plant(getattr(place, name)))
    with pytest.raises(ConversionError, match="computes something else"):
        from_torch(model, (2, 9, 9))


@pytest.mark.parametrize("relative", [1e-6, 1e-9])
def test_a_change_of_one_number_is_found(relative, model):
    network = from_torch(model, (2, 9, 9))
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
    network = from_torch(model, (2, 9, 9))

    def run(x):
        with torch.no_grad():
            return model(torch.from_numpy(x).float()).numpy()

    assert compare_outputs(run, network).share <= 1
    with pytest.raises(ConversionError, match="outputs of shape"):
        compare_outputs(lambda x: run(x)[:, :2], network)


def test_outputs_that_are_not_numbers_are_refused(model):
    network = from_torch(model, (2, 9, 9))
    with pytest.raises(ConversionError, match="differ by inf"):
        compare_outputs(lambda x: np.full((len(x), 3), np.nan, dtype=np.float32), network)
