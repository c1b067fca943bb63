"""How do you solve z = σ(Wz + v) for a W of your own?

W = A ⊗ B acts on images of p × q pixels by Z ↦ AZBᵀ and never needs its (pq)² entries for a
product. Two products make it an operator; the laws that it must keep are tested below.

    python examples/own_operator.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import solvers
from solvers.testing import check_operator


@dataclass(frozen=True, eq=False)
class Kronecker(solvers.LinearOperator):
    """W = A ⊗ B, with a metric Λ of one positive number per unit."""

    A: Tensor
    B: Tensor
    metric: Tensor

    def mv(self, z: Tensor) -> Tensor:
        """Return Wz, that is AZBᵀ."""
        Z = z.unflatten(-1, (len(self.A), len(self.B)))
        return (self.A @ Z @ self.B.T).flatten(-2)

    def rmv(self, z: Tensor) -> Tensor:
        """Return Wᵀz, that is AᵀZB."""
        Z = z.unflatten(-1, (len(self.A), len(self.B)))
        return (self.A.T @ Z @ self.B).flatten(-2)


def random_kronecker(p: int = 3, q: int = 4, dtype: torch.dtype = torch.float64) -> Kronecker:
    """Return A ⊗ B with ‖A‖₂‖B‖₂ = 0.8, so that I − W is strongly monotone."""
    A, B = torch.randn(p, p, dtype=dtype), torch.randn(q, q, dtype=dtype)
    A, B = A / torch.linalg.matrix_norm(A, 2), 0.8 * B / torch.linalg.matrix_norm(B, 2)
    return Kronecker(A, B, torch.ones(p * q, dtype=dtype))


if __name__ == "__main__":
    torch.manual_seed(0)
    W = random_kronecker()
    check_operator(W)  # every law, or an AssertionError that names the one that fails

    A = W.A.requires_grad_()
    v = torch.randn(5, W.n, dtype=torch.float64)
    solution = solvers.equilibrium(solvers.Inclusion(W, v, solvers.ReLU()), tol=1e-10)
    solution.value.square().sum().backward()
    assert A.grad is not None

    print(solution.message())
    print(f"‖z − z*‖ ≤ {float(solution.error_bound.max()):.0e}, gradient of A: {A.grad.shape}")
