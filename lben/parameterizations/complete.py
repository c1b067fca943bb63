"""Which free tensors reach every (W, U, C, D, Λ) with M(Λ, γ) ⪰ 0, its boundary included?

The direct parameterization needs ‖D‖₂ < γ; residual layers have ‖D‖₂ = γ. Symbols:
docs/glossary.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lben.parameterizations.equilibrium import EquilibriumParameterization
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.weights import DenseWeights


class CompleteParameterization(EquilibriumParameterization[DenseWeights]):
    """Free tensors F, Y, C, N, d, b, b_y of every layer that the certificate admits at γ.

    Let [Q₁; Q₂] = FR⁻¹ with RᵀR = FᵀF, which has orthonormal columns; γ₀ just below γ; Λ = diag eᵈ.

        D = γ₀Q₁,   U = −Λ⁻¹(CᵀQ₁ + √γ₀ YᵀQ₂),
        W = I − Λ⁻¹(CᵀC/2γ₀ + YᵀY/2 + εΛ + N − Nᵀ).

    Then M(Λ, γ₀) = [√γ₀Q₂, Y]ᵀ[√γ₀Q₂, Y] + diag(0, 2εΛ) ⪰ 0; the difference between γ₀ and γ lets
    floating point prove it. Conversely every M(Λ, γ₀) ⪰ diag(0, 2εΛ) has such a square root, whose
    blocks satisfy these equations. γ is the unit of y (see `DirectParameterization`): the free
    tensors are those of y/γ, for which γ = 1.

    Args:
        weights: weights with a bound γ, at which the tensors start; best in float64.

    Raises:
        ValueError: if the weights claim no bound, or if M(Λ, γ) is singular or indefinite for them.

    Reference:
        Revay, Wang and Manchester (2024), "Recurrent equilibrium networks", for the feed-through;
        the converse is the square root of a positive semi-definite matrix.

    Example:
        >>> import torch
        >>> from lben import certify
        >>> from lben.parameterizations import CompleteParameterization, DirectParameterization
        >>> _ = torch.manual_seed(0)
        >>> weights = DirectParameterization(4, 5, 2, gamma=2.0, dtype=torch.float64)()
        >>> free = CompleteParameterization(weights)
        >>> torch.allclose(free().W, weights.W, atol=1e-3), certify(free()).bound
        (True, 2.0)
    """

    def __init__(self, weights: DenseWeights) -> None:
        super().__init__()
        if weights.gamma is None:
            raise ValueError(
                "the weights claim no bound (gamma is None), and this parameterization needs one: "
                "give them that of claim = tighten_diagonal(weights), by "
                "dataclasses.replace(weights, gamma=claim.gamma, Lambda=claim.Lambda)"
            )
        self.gamma = self._bound = weights.gamma
        w = weights.apply(Tensor.detach).divide(self.gamma)
        gamma, identity = self._inner(), _identity(w.in_features, w.U)
        D = w.C.new_zeros(w.out_features, w.in_features) if w.D is None else w.D
        G = w.Lambda[:, None] * w.U + w.C.T @ D / gamma
        rest = w.Lambda[:, None] * (_identity(w.hidden_features, w.U) - w.W)
        S = rest + rest.T - w.C.T @ w.C / gamma
        # The block Cholesky factor [A B; 0 E] of M(Λ, γ₀) − diag(0, 2εΛ).
        A, failed = torch.linalg.cholesky_ex(gamma * identity - D.T @ D / gamma, upper=True)
        if int(failed):
            raise ValueError(f"‖D‖₂ must be below gamma = {self.gamma}")
        B = -torch.linalg.solve_triangular(A.T, G.T, upper=False)
        S = S - B.T @ B
        scale = w.Lambda.rsqrt()
        smallest = float(torch.linalg.eigvalsh(S * scale[:, None] * scale)[0])
        if not smallest > 100 * torch.finfo(S.dtype).eps:
            raise ValueError(
                "the weights do not satisfy the certificate strictly: smallest "
                f"eigenvalue in the Λ norm {smallest:.3g}. Their claim gamma = {self.gamma} is too "
                "small, or its Λ is another: take γ and Λ of tighten_diagonal(weights)"
            )
        self.epsilon = smallest / 8
        E = torch.linalg.cholesky(S - torch.diag(2 * self.epsilon * w.Lambda), upper=True)
        Q2 = torch.cat([A, A.new_zeros(len(E), A.shape[1])]) / math.sqrt(gamma)
        self.F = nn.Parameter(torch.cat([D / gamma, Q2]))
        self.Y = nn.Parameter(torch.cat([B, E]))
        self.C, self.log_metric = nn.Parameter(w.C.clone()), nn.Parameter(w.Lambda.log())
        self.b, self.b_y = nn.Parameter(w.b.clone()), nn.Parameter(w.b_y.clone())
        self.N = nn.Parameter((rest - rest.T) / 4)

    @staticmethod
    def _inner() -> float:
        return 1 / math.sqrt(UNIT_BOUND)

    def forward(self) -> DenseWeights:
        """Return the explicit weights with bound γ, differentiable in the free tensors."""
        gamma, q = self._inner(), len(self.C)
        R = torch.linalg.cholesky(self.F.T @ self.F, upper=True)
        Q = torch.linalg.solve_triangular(R, self.F, upper=True, left=False)
        Lambda = self.log_metric.exp()[:, None]
        U = -(self.C.T @ Q[:q] + math.sqrt(gamma) * self.Y.T @ Q[q:]) / Lambda
        half = self.C.T @ self.C / (2 * gamma) + self.Y.T @ self.Y / 2 + self.N - self.N.T
        W = (1 - self.epsilon) * torch.eye(len(U), dtype=U.dtype, device=U.device) - half / Lambda
        return DenseWeights(
            W=W, U=U, b=self.b, C=self.C, D=gamma * Q[:q], b_y=self.b_y,
            Lambda=Lambda[:, 0], gamma=1.0,
        ).scale(self._bound)  # fmt: skip


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
