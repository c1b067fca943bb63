"""Equilibrium layers of images of every kind, with inputs and matrices."""

import torch

from lben import (
    EquilibriumConv2d,
    PooledEquilibriumConv2d,
)
from solvers import LeakyReLU, Tanh

DOUBLE = {"dtype": torch.float64, "epsilon": 0.05, "tol": 1e-13, "on_failure": "raise"}

IMAGE = (4, 6)


def conv(*sizes, **options):
    sizes = sizes or (2, 3, 2)
    return EquilibriumConv2d(*sizes, image=IMAGE, **{**DOUBLE, **options})


def pooled(channels=3, **options):
    options = {**DOUBLE, "pool": 2, **options}
    return PooledEquilibriumConv2d(2, channels, 3, image=IMAGE, **options)


LAYERS = {
    "zeros": lambda: conv(gamma=0.7),
    "circular": lambda: conv(gamma=0.7, circular=True, kernel_size=1),
    "circular 3 × 3": lambda: EquilibriumConv2d(2, 3, 2, image=(5, 6), circular=True, **DOUBLE),
    "state": lambda: conv(2, 3, gamma=2.0),
    "unbounded": lambda: conv(gamma=None, activation=Tanh()),
    "monotone": lambda: conv(gamma=None, learn_metric=False),
    "skip": lambda: conv(skip=0.5, activation=LeakyReLU(0.1)),
    "residual": lambda: conv(skip=1.0),
    "stride": lambda: conv(2, 3, 2, stride=2, kernel_size=1),
    "pooled": lambda: pooled(),
    "pooled, circular": lambda: pooled(circular=True, kernel_size=1, gamma=3.0),
    "pooled, unbounded": lambda: pooled(gamma=None),
    "two scales": lambda: PooledEquilibriumConv2d(2, (2, 3), 3, image=(6, 8), pool=2, **DOUBLE),
    "two scales, circular": lambda: PooledEquilibriumConv2d(
        2, (2, 1), 3, image=(10, 10), pool=2, circular=True, **DOUBLE
    ),
}


def moved(name):
    """The layer of a name, its parameters away from where they start."""
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def dense(layer):
    weights = layer.weights()
    if isinstance(layer, EquilibriumConv2d):
        return weights.dense(weights.placed.grid)
    return weights.dense()
