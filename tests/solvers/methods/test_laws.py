"""What every method promises: the published laws for all methods alike."""

import pytest
import torch

from solvers import (
    Anderson,
    Auto,
    BlockSubstitution,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    NeuralODE,
    PeacemanRachford,
    ReLU,
    SemismoothNewton,
)
from solvers.testing import MethodLaws
from tests.problems import block_triangular_operator, kronecker_operator

METHODS = [
    Auto(), PeacemanRachford(), PeacemanRachford(compiled=False), PeacemanRachford(step_size=0.5),
    DouglasRachford(), ForwardBackward(), Anderson(), SemismoothNewton(),
    SemismoothNewton(patience=0), NeuralODE(), NeuralODE(order=1),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr, scope="class")
class TestLaws(MethodLaws):
    @pytest.fixture(autouse=True)
    def _given(self, method):
        self._method = method

    def make_method(self):
        return self._method


class TestOwnOperator(TestLaws):
    """On an operator of two products, which no method knows."""

    def make_problem(self, dtype, samples):
        g = torch.Generator().manual_seed(8)
        v = torch.randn(16, 8, dtype=torch.float64, generator=g)[:samples]
        return Inclusion(kronecker_operator(2, 4, dtype=dtype), v.to(dtype), ReLU())


class TestBlockSubstitution(MethodLaws):
    def make_method(self):
        return BlockSubstitution()

    def make_problem(self, dtype, samples):
        W = block_triangular_operator(dtype=dtype)
        g = torch.Generator().manual_seed(8)
        v = torch.randn(16, W.n, dtype=torch.float64, generator=g)[:samples]
        return Inclusion(W, v.to(dtype), ReLU())
