"""The margin of a block is a lower bound of what it is of, and near it."""

import pytest
import torch

from lben.certificates.inequality import Inequality
from tests.lben.weights.kinds import KINDS


@pytest.mark.parametrize("kind", ["dense", "dense without D"])
def test_the_margin_changes_sign_where_the_bound_becomes_false(kind):
    w = KINDS[kind]()
    block, low, high = Inequality.of(w, w.Lambda.numpy()), 1e-3, 10 * w.gamma
    assert block.margin(high) > 0 >= block.margin(low)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if block.margin(middle) > 0 else (middle, high)
    root = w.Lambda.sqrt()
    best = 0.0
    for _ in range(300):
        slopes = torch.rand(6).round().double()
        K = torch.linalg.solve(torch.eye(6) - slopes[:, None] * w.W, slopes.diag())
        J = w.C @ K @ w.U + (0 if w.D is None else w.D)
        best = max(best, float(torch.linalg.matrix_norm(J, 2)))
    assert best <= high <= w.gamma * (1 + 1e-6)
    assert block.smallest_eigenvalue(high * 1.01) > 0
    assert block.output_gain() >= float(torch.linalg.matrix_norm(w.C / root, 2))
