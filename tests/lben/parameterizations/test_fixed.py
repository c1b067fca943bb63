"""Weights that are given come back bit by bit, and are not trained."""

import pytest
import torch

from lben.parameterizations import FixedWeights
from tests.lben.weights.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back(kind):
    weights = KINDS[kind]() if callable(KINDS[kind]) else KINDS[kind]
    fixed = FixedWeights(weights)
    assert fixed().fingerprint == weights.fingerprint
    assert fixed.gamma == weights.gamma
    assert not any(p.requires_grad for p in fixed.parameters())


def test_a_move_moves_them():
    weights = KINDS["dense"]()
    assert FixedWeights(weights).float()().W.dtype == torch.float32
