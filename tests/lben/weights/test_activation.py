"""Activations of networks: their slopes hold, and their checks refuse."""

import pytest
import torch

from lben.weights.activation import IDENTITY, RELU, Activation


@pytest.mark.parametrize("activation", [RELU, IDENTITY], ids=lambda a: a.name)
def test_no_chord_leaves_the_slopes(activation):
    a, b = torch.randn(2, 10_000, dtype=torch.float64)
    slope = (activation(a) - activation(b)) / (a - b)
    assert bool((slope >= activation.low - 1e-9).all() & (slope <= activation.high + 1e-9).all())


def test_slopes_and_knots_out_of_order_are_refused():
    with pytest.raises(ValueError, match="slopes must be in order"):
        Activation(name="x", low=1.0, high=0.0, function=torch.relu)
    with pytest.raises(ValueError, match="knots must increase"):
        Activation(name="x", low=0.0, high=1.0, knots=(1.0, 0.0), function=torch.relu)
