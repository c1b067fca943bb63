"""Layers of every family, moved away from where they start, with inputs and attacks."""

import pytest
import torch
from torch.autograd import gradcheck

from lben import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from lben.weights.linear_maps import Dense
from solvers import Tanh

DENSE = {
    "SLL": lambda **o: SLLLinear(6, 4, **o),
    "SLL squared": lambda **o: SLLLinear(6, 9, squarings=2, **o),
    "CPL": lambda **o: CPLLinear(6, 4, **o),
    "AOL": lambda **o: AOLLinear(6, 4, **o),
    "AOL with q": lambda **o: AOLLinear(4, 6, learn_q=True, **o),
    "spectral": lambda **o: SpectralLinear(6, 4, **o),
    "Cayley": lambda **o: OrthogonalLinear(6, 4, **o),
    "Householder": lambda **o: OrthogonalLinear(4, 6, orthogonal_map="householder", **o),
    "sandwich": lambda **o: SandwichLinear(6, 4, **o),
    "wide sandwich": lambda **o: SandwichLinear(6, 4, hidden_features=9, **o),
}

CONVOLUTIONAL = {
    "SLL": lambda **o: SLLConv2d(3, 2, **o),
    "SLL 1 x 1": lambda **o: SLLConv2d(3, 2, 1, **o),
    "SLL even": lambda **o: SLLConv2d(3, 2, 2, **o),
    "SLL squared": lambda **o: SLLConv2d(2, 3, squarings=1, **o),
    "CPL": lambda **o: CPLConv2d(3, 2, **o),
    "AOL": lambda **o: AOLConv2d(3, 2, **o),
    "spectral": lambda **o: SpectralConv2d(2, 3, **o),
    "sandwich": lambda **o: SandwichConv2d(3, 2, **o),
}

IMAGE = (5, 6)


def perturb(layer):
    """Move every parameter away from where it starts, as training does."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.7)
    return layer


def sample(layer, count=1):
    shape = (layer.inputs,) if isinstance(layer.map, Dense) else (layer.inputs, *IMAGE)
    return torch.randn(count, *shape, dtype=next(layer.parameters()).dtype)


def check_gradients(layer):
    if hasattr(layer, "activation"):
        layer.activation = Tanh()
    x = sample(layer, 2).requires_grad_()
    parameters = dict(layer.parameterization.named_parameters())
    for name, p in parameters.items():
        layer(x).square().sum().backward()
        direction = torch.randn_like(p)
        if "original" in name:
            direction.fill_diagonal_(0)
        found = float((p.grad * direction).sum())
        p.grad, h, value = None, 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * h)
                value.append(float(layer(x).square().sum()))
                p.add_(direction, alpha=-sign * h)
        assert found == pytest.approx((value[0] - value[1]) / (2 * h), rel=1e-4, abs=1e-6)
        for other in parameters.values():
            other.grad = None
    assert gradcheck(layer, (x[:1],))
