"""What is M(Λ, γ), with every rounding of its evaluation enclosed?

The only place where the matrix inequality is written down: dense layers evaluate it once,
convolutional ones at every frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lben.rigorous import (
    Array,
    Enclosure,
    block,
    down,
    norm_bound,
    smallest_eigenvalue_bound,
)
from lben.weights import ExplicitWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class Inequality:
    """The blocks of M(Λ, γ) for one set of weights.

    Args:
        W: n × n, or None for an explicit layer (W = 0).
        U: n × p.
        C: q × n.
        D: q × p; a number d for D = dI; None for no feed-through.
        Lambda: n × 1, exact positive numbers.
    """

    W: Enclosure | None
    U: Enclosure
    C: Enclosure
    D: Enclosure | float | None
    Lambda: Enclosure

    @classmethod
    def of(cls, weights: ExplicitWeights, Lambda: Array) -> Inequality:
        """Take float64 weights on the CPU as they are, with a multiplier of n numbers."""
        w = {name: tensor.numpy() for name, tensor in weights.tensors().items()}
        return cls(
            W=Enclosure(w["W"]) if w["W"].any() else None,
            U=Enclosure(w["U"]),
            C=Enclosure(w["C"]),
            D=_feedthrough(w["D"]) if "D" in w else None,
            Lambda=Enclosure(Lambda[:, None]),
        )

    @property
    def n(self) -> int:
        """Units."""
        return self.U.mid.shape[0]

    def margin(self, gamma: float | None) -> float:
        """Return a proved lower bound of the smallest eigenvalue that has to be positive.

        It is that of `reduced`, with every unit scaled by a power of two near Λ^(−½): an
        exact congruence, without which units of very different Λ could not be proved together.
        """
        matrix = self.reduced(gamma)
        inputs = len(matrix.mid) - self.n
        root = np.ones(len(matrix.mid))
        root[inputs:] = np.ldexp(1.0, -(np.frexp(self.Lambda.mid[:, 0])[1] // 2))
        scale = root[:, None] * root
        return smallest_eigenvalue_bound(Enclosure(matrix.mid * scale, matrix.radius * scale))

    def reduced(self, gamma: float | None) -> Enclosure:
        """Return a matrix that is positive definite if and only if M(Λ, γ) is.

        - γ None: 2Λ − ΛW − WᵀΛ;
        - D = dI or absent: the Schur complement 2Λ − ΛW − WᵀΛ − CᵀC/γ − GGᵀ/(γ − d²/γ) with
          G = ΛU + dCᵀ/γ;
        - no units: γI − DᵀD/γ, or γI − DDᵀ/γ if that is smaller;
        - otherwise M(Λ, γ) itself.
        """
        if gamma is None:
            return self.well_posedness()
        if self.n == 0 and isinstance(self.D, Enclosure):
            D = self.D if self.D.mid.shape[0] <= self.D.mid.shape[1] else self.D.T
            return _identity(D.mid.shape[0], gamma) - D @ D.T / gamma
        S = self.well_posedness() - self.C.T @ self.C / gamma
        G = self.Lambda * self.U
        if isinstance(self.D, Enclosure):
            return self._assemble(gamma, S, G, self.D)
        d = _identity(1, self.D or 0.0)
        corner = _identity(1, gamma) - d * d / gamma
        if self.n == 0:
            return corner
        if not corner.mid[0, 0] - corner.radius[0, 0] > 0:
            return Enclosure(np.full((1 + self.n, 1 + self.n), -math.inf))
        if self.D:
            G = G + d * self.C.T / gamma
        return S - G @ G.T * corner.reciprocal()

    def well_posedness(self) -> Enclosure:
        """2Λ − ΛW − WᵀΛ."""
        if self.W is None:
            return Enclosure(np.diag(2 * self.Lambda.mid[:, 0]))
        weighted = self.Lambda * (_identity(self.n) - self.W)
        return weighted + weighted.T

    def monotonicity(self) -> float:
        """Return a proved lower bound of λmin(sym H), at least 0; 1 for W = 0."""
        if self.W is None:
            return 1.0
        return max(down(smallest_eigenvalue_bound(self._H())), 0.0)

    def norm(self) -> float:
        """Return a proved upper bound of ‖H‖₂; 1 for W = 0."""
        return 1.0 if self.W is None else norm_bound(self._H())

    def output_gain(self) -> float:
        """Return a proved upper bound of ‖CΛ^(−½)‖₂."""
        if self.C.mid.size == 0:
            return 0.0
        return norm_bound(self.C * self.Lambda.sqrt().reciprocal().T)

    def smallest_eigenvalue(self, gamma: float | None) -> float:
        """Compute λmin of M(Λ, γ) (or of 2Λ − ΛW − WᵀΛ), in coordinates that shrink the input.

        M acts as γI on inputs orthogonal to the rows of U and D; an orthonormal basis of those
        rows replaces the input space when it is larger. For D = dI it acts as (γ − d²/γ)I on
        inputs orthogonal to the rows of U and C.
        """
        if gamma is None:
            return _smallest(self.well_posedness().mid)
        if self.n == 0:
            return _smallest(self.reduced(gamma).mid)
        S = self.well_posedness().mid - self.C.mid.T @ self.C.mid / gamma
        side: Array = -self.U.mid.T * self.Lambda.mid.T
        if isinstance(self.D, Enclosure):
            D, d = self.D.mid, 0.0
            side = side - D.T @ self.C.mid / gamma
        else:
            D, d = np.zeros((0, len(side))), self.D or 0.0
            side = side - d * self.C.mid / gamma if d else side
        rows = np.vstack([D, side.T])
        if rows.shape[1] > rows.shape[0]:
            basis = scipy.linalg.qr(rows.T, mode="economic")[0]
            side, D = basis.T @ side, D @ basis
        corner = (gamma - d * d / gamma) * np.eye(len(side)) - D.T @ D / gamma
        return _smallest(np.block([[corner, side], [side.T, S]]))

    def _assemble(self, gamma: float, S: Enclosure, G: Enclosure, D: Enclosure) -> Enclosure:
        corner = _identity(D.mid.shape[1], gamma) - D.T @ D / gamma
        side = -(G.T + D.T @ self.C / gamma)
        return block([[corner, side], [side.T, S]])

    def _H(self) -> Enclosure:
        """Λ^½ (I − W) Λ^(−½); 2 sym H = Λ^(−½)(2Λ − ΛW − WᵀΛ)Λ^(−½)."""
        assert self.W is not None
        root = self.Lambda.sqrt()
        return root * (_identity(self.n) - self.W) * root.reciprocal().T


def _identity(size: int, value: float = 1.0) -> Enclosure:
    return Enclosure(value * np.eye(size))


def _smallest(matrix: Array) -> float:
    if not np.isfinite(matrix).all():
        return -math.inf
    return float(np.linalg.eigvalsh(matrix)[0])


def _feedthrough(D: Array) -> Enclosure | float:
    """Return the number d if D = dI."""
    square = D.shape[0] == D.shape[1]
    return float(D[0, 0]) if square and not (D - D[0, 0] * np.eye(len(D))).any() else Enclosure(D)
