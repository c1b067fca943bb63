"""An equilibrium layer takes every parameterization that returns weights."""

import pytest
import torch
from torch import nn

from lben import DenseWeights, certify
from lben.layers import EquilibriumLayer
from lben.parameterizations import EquilibriumParameterization


class Diagonal(EquilibriumParameterization[DenseWeights]):
    """z = σ(−softplus(d) z + x): monotone for every d, and 1-Lipschitz."""

    def __init__(self):
        super().__init__()
        self.gamma = 1.0
        self.d = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self):
        W, identity = -torch.diag(nn.functional.softplus(self.d)), torch.eye(3).double()
        zero = torch.zeros(3).double()
        return DenseWeights(
            W=W, U=identity, b=zero, C=identity, D=None, b_y=zero, Lambda=1 + zero, gamma=1.0
        )


def test_a_parameterization_of_ones_own_makes_a_layer():
    layer = EquilibriumLayer(Diagonal(), tol=1e-10)
    layer(torch.ones(2, 3).double()).sum().backward()
    assert bool((layer.parameterization.d.grad < 0).all())
    assert certify(layer).bound == 1.0


def test_it_has_to_say_what_its_weights_are():
    with pytest.raises(TypeError, match="abstract"):
        EquilibriumParameterization()
