"""The spectral norm of matrices and convolutions from above, nearer with every squaring."""

from itertools import pairwise

import pytest
import torch

from lben.parameterizations import Spectral
from tests.lben.parameterizations.test_multipliers import KERNELS, SHAPES, operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, *KERNELS])
def test_spectral_comes_near_the_norm_with_squarings(dtype, shape):
    U = torch.randn(shape, dtype=dtype)
    A = U.double() if U.ndim == 2 else operator(U.double(), size=12)
    norm = float(torch.linalg.matrix_norm(A, 2)) ** 2
    found = [float(Spectral(s)(U)[0]) for s in (0, 1, 2, 3, 4)]
    assert all(f >= norm for f in found)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(found))
    assert found[-1] <= 1.25 * norm


def test_the_bound_of_a_diagonal_matrix_is_its_largest_square():
    T = Spectral(6)(torch.diag(torch.tensor([3.0, -4.0, 0.5], dtype=torch.float64)))
    assert T.shape == (3,)
    assert 16 <= float(T[0]) < 16.2


def test_negative_squarings_are_refused():
    with pytest.raises(ValueError, match="squarings must be at least 0"):
        Spectral(-1)
