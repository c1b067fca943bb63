"""Modules are pickled with torch's parametrizations and without."""

import pickle

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lben.parameterizations.parametrized import PicklableParametrized


class Map(PicklableParametrized):
    def __init__(self):
        super().__init__()
        self.V = nn.Parameter(torch.randn(3, 3))


def test_a_parametrized_module_comes_back_with_its_parametrization():
    module = Map()
    parametrizations.orthogonal(module, "V")
    other = pickle.loads(pickle.dumps(module))
    assert parametrize.is_parametrized(other, "V")
    assert torch.equal(other.V, module.V)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    assert not torch.equal(other.V, module.V)
    torch.testing.assert_close(other.V @ other.V.T, torch.eye(3))


def test_one_without_parametrizations_is_pickled_as_any_module():
    module = Map()
    assert torch.equal(pickle.loads(pickle.dumps(module)).V, module.V)
