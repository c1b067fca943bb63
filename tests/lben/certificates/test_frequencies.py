"""Blocks at frequencies are those of the matrix on a torus."""

import dataclasses

import numpy as np
import pytest
import torch

from lben.certificates.frequencies import at_frequencies
from tests.lben.weights.kinds import KINDS

GRID = (5, 5)


@pytest.mark.parametrize("kind", [
    "kernel D, circular", "oblong D, circular", "kernel D", "number D", "without a state"
])  # fmt: skip
def test_symbols_have_the_singular_values_of_the_matrices(kind):
    w = dataclasses.replace(KINDS[kind](), circular=True)
    m, blocks = w.dense(GRID), at_frequencies(w, GRID)
    assert len(blocks) == GRID[0] * (GRID[1] // 2 + 1)
    for name in ("W", "U", "C", *(("D",) if isinstance(w.D, torch.Tensor) else ())):
        parts = [getattr(block, name) for block in blocks]
        if parts[0] is None:
            assert not getattr(m, name).any()
            continue
        largest = max(np.linalg.norm(p.mid, 2) for p in parts)
        exact = float(torch.linalg.matrix_norm(getattr(m, name), 2))
        assert largest == pytest.approx(exact, rel=1e-10)
        assert max(p.radius.max() for p in parts) < 1e-12 * (1 + exact)


def test_the_least_eigenvalue_over_all_is_that_of_the_whole():
    w = KINDS["kernel D, circular"]()
    m = w.dense(GRID)
    S = 2 * m.Lambda.diag() - m.Lambda[:, None] * m.W - (m.Lambda[:, None] * m.W).T
    root = m.Lambda.sqrt()
    exact = float(torch.linalg.eigvalsh(S / root[:, None] / root)[0]) / 2
    found = min(block.monotonicity() for block in at_frequencies(w, GRID))
    assert found <= exact
    assert found == pytest.approx(exact, rel=1e-9)
