"""Which number surely lies below every eigenvalue of a diagonal plus a low-rank matrix?

Without an n × n matrix: a test of definiteness that costs one QR factorization of a tall matrix,
and bisection on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
_WIDTH = 1e-9
"""Relative width at which bisection stops."""


# Note [Definite without the matrix]
# PQᵀ + QPᵀ = YYᵀ − XXᵀ with Y = (P + Q)/√2, X = (P − Q)/√2, so M = diag(D) + YYᵀ − XXᵀ. It has at
# most r positive directions beyond D, hence (Weyl) λmin(M) is at most the (r + 1)-th smallest Dᵢ,
# called c. The r entries below c are raised to c and paid for by columns √(c − Dᵢ) eᵢ of X. After
# that E = D − t is positive for every t < c, that is for every t that can matter: no pole is ever
# crossed, and t equal to an entry of D needs no case of its own.
#
# With Y' = E^(−½)Y and X' = E^(−½)X, M − t ⪰ 0 if and only if X'ᵀ(I + Y'Y'ᵀ)⁻¹X' ⪯ I. That matrix
# is R₂₂ᵀR₂₂ for the last columns of the QR factorization of S = [[Y', X'], [I, 0]]: the residual
# of the least-squares problem min ‖X'x − Y'c‖² + ‖c‖², which forms no difference of large squares.
#
# Rounding: R is exact for S + δS with column norms of δS at most γ times those of S, γ a small
# multiple of rows · columns · u (Higham 2002, Theorem 19.4). Since ‖c‖ is part of the residual,
# ‖c‖ ≤ σ ≤ 1 for ‖x‖ = 1, and σ = ‖R₂₂‖₂ moves by at most γ(‖X'‖ + ‖Y'‖ + √r). The test adds that
# to σ. What rounding did to D, P and Q before is `slack`, taken off t at the end.
@dataclass(frozen=True, eq=False)
class DiagonalPlusLowRank:
    """M = diag(D) + YYᵀ − XXᵀ in float64, with λmin(M) ≤ min D.

    Attributes:
        D: n numbers.
        Y: n × r.
        X: n × at most 2r.
        slack: bound of what rounding of the entries moved the eigenvalues by.
    """

    D: Float[Tensor, " n"]
    Y: Float[Tensor, "n r"]
    X: Float[Tensor, "n k"]
    slack: float

    @staticmethod
    def of(
        D: Float[Tensor, " n"], P: Float[Tensor, "n r"], Q: Float[Tensor, "n r"]
    ) -> DiagonalPlusLowRank:
        """Return M = diag(D) + PQᵀ + QPᵀ, given in float64, with r < n."""
        # Columns of equal length make X and Y as small as a scaling of columns can.
        p, q = torch.linalg.vector_norm(P, dim=0), torch.linalg.vector_norm(Q, dim=0)
        length = (p * q).sqrt()
        P = P * torch.where(length > 0, length / p, 0.0)
        Q = Q * torch.where(length > 0, length / q, 0.0)
        Y, X = (P + Q) / math.sqrt(2), (P - Q) / math.sqrt(2)
        slack = 32 * _EPS * (float(D.abs().max()) + 2 * float(length.square().sum()))
        smallest, index = D.topk(P.shape[1] + 1, largest=False)
        low = smallest < smallest[-1]
        raised = index[low]
        columns = D.new_zeros(len(D), len(raised))
        columns[raised, torch.arange(len(raised), device=D.device)] = (
            smallest[-1] - smallest[low]
        ).sqrt()
        return DiagonalPlusLowRank(
            D.clamp_min(smallest[-1]), Y, torch.cat([X, columns], dim=1), slack
        )

    def exceeds(self, t: float) -> bool:
        """Say whether λmin(M) ≥ t − slack was proved, in one QR factorization."""
        E = self.D - t
        if not bool((E > 0).all()):
            return False
        r, k = self.Y.shape[1], self.X.shape[1]
        scaled = torch.cat([self.Y, self.X], dim=1) / E.sqrt()[:, None]
        S = torch.cat([scaled, torch.eye(r, r + k, dtype=E.dtype, device=E.device)])
        R = torch.linalg.qr(S, mode="r")[1]
        gamma = 8 * S.shape[0] * S.shape[1] * _EPS
        sigma = float(torch.linalg.matrix_norm(R[r:, r:], 2)) if k else 0.0
        return sigma + gamma * (float(torch.linalg.matrix_norm(scaled)) * 2 + math.sqrt(r)) <= 1

    def smallest(self) -> float:
        """Return at most λmin(M), by bisection; −∞ where nothing could be proved."""
        high = float(self.D.min())
        X, Y = (float(T.square().sum()) for T in (self.X, self.Y))
        if X == 0:
            return high - self.slack
        # E ≥ 2‖X‖² makes σ² ≤ ½; the rest keeps the rounding terms of the test below that.
        reach = 2 * X + 1e-6 * Y + self.slack
        while not self.exceeds(low := high - reach):
            reach *= 2
            if not math.isfinite(reach):
                return -math.inf
        while high - low > max(self.slack, _WIDTH * max(abs(low), abs(high))):
            middle = 0.5 * (low + high)
            if self.exceeds(middle):
                low = middle
            else:
                high = middle
        return low - self.slack
