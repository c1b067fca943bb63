"""Batches of matrices, factored where PyTorch's threads do not disturb each other."""

import pytest
import torch

from solvers.operators import batched

SIZES = [(4, 3), (3, 120), (0, 120)]


@pytest.fixture(params=SIZES)
def matrices(request):
    count, n = request.param
    torch.manual_seed(0)
    return torch.randn(count, n, n, dtype=torch.float64) / n**0.5 + 2 * torch.eye(n).double()


def test_inverses_solutions_and_factors(matrices):
    count, n, _ = matrices.shape
    right = torch.randn(count, n, dtype=torch.float64)
    found, info = batched.inverse(matrices)
    identity = torch.eye(n, dtype=torch.float64).expand(count, n, n)
    torch.testing.assert_close(found @ matrices, identity)
    assert info.tolist() == count * [0]
    solved, info = batched.solution(matrices, right)
    torch.testing.assert_close((matrices @ solved[..., None])[..., 0], right)
    assert info.tolist() == count * [0]
    lu, pivots = batched.factors(matrices)
    torch.testing.assert_close(torch.linalg.lu_solve(lu, pivots, matrices), identity)


@pytest.mark.parametrize("n", [3, 120])
def test_singular_matrices_are_named(n):
    matrices = torch.eye(n, dtype=torch.float64).repeat(3, 1, 1)
    matrices[1, 0, 0] = 0.0
    for _, info in (
        batched.inverse(matrices),
        batched.solution(matrices, matrices[:, 0]),
    ):
        assert (info != 0).tolist() == [False, True, False]


def test_no_batch_of_large_matrices_reaches_pytorch(monkeypatch):
    """Where it does, LU factorizations are wrong, or do not end, with some numbers of threads."""
    seen = []
    for name in ("inv_ex", "solve_ex", "lu_factor_ex"):
        original = getattr(torch.linalg, name)

        def watched(A, *args, original=original):
            seen.append(A.ndim)
            return original(A, *args)

        monkeypatch.setattr(torch.linalg, name, watched)
    large = torch.eye(150, dtype=torch.complex128).repeat(2, 1, 1)
    batched.inverse(large)
    batched.solution(large, large[:, 0])
    batched.factors(large)
    assert seen == 6 * [2]
