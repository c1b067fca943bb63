"""A layer leaves autocast in both directions, also in second derivatives."""

import torch

from lben import EquilibriumLinear
from lben.layers.autocast import leave_half, outside_autocast


def test_half_precision_that_autocast_made_is_undone_and_no_other():
    x = torch.randn(3).bfloat16()
    assert leave_half(x, torch.float32) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert leave_half(x, torch.float32).dtype == torch.float32
        wide = torch.randn(3).double()
        assert leave_half(wide, torch.float32) is wide


def test_gradients_within_autocast_are_those_without():
    torch.manual_seed(0)
    layer = EquilibriumLinear(4, 6, 3, tol=1e-6)
    x = torch.randn(5, 4, requires_grad=True)
    inputs = (x, *layer.parameters())

    def first(y):
        return torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)

    def second(gradients):
        return torch.autograd.grad(gradients[0].square().sum(), x)

    expected = first(layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = outside_autocast(layer, x)
        assert y.dtype == torch.float32
        found = first(y)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second(found), second(expected), rtol=1e-3, atol=1e-4)
