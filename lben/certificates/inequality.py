"""What is M(Λ, γ), with every rounding of its evaluation enclosed?

The only place where the matrix inequality is written down: dense layers evaluate it once,
convolutional ones at every frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from lben.rigorous import (
    TINY,
    Array,
    Enclosure,
    block,
    down,
    is_denormal,
    norm_bound,
    power_of_two,
    smallest_eigenvalue_bound,
)
from lben.weights import DenseWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class Inequality:
    """The blocks of M(Λ, γ) for one set of weights.

    Args:
        W: n × n, or None for an explicit layer (W = 0).
        U: n × p.
        C: q × n.
        D: q × p; a number d for D = dI; None for no feed-through.
        Lambda: n × 1 positive numbers, exact until they are scaled.
    """

    W: Enclosure | None
    U: Enclosure
    C: Enclosure
    D: Enclosure | float | None
    Lambda: Enclosure

    @classmethod
    def of(cls, weights: DenseWeights, Lambda: Array) -> Inequality:
        """Take float64 weights on the CPU as they are, with a multiplier of n numbers."""
        w = {name: tensor.numpy() for name, tensor in weights.tensors().items()}
        return cls(
            W=None if _vanishes(w["W"]) else Enclosure(w["W"]),
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

        It is that of `reduced`, in the units of `in_units_of`; −inf where numbers leave the range.
        """
        if gamma is not None and not TINY <= gamma < math.inf:
            return -math.inf
        unit = 1.0 if gamma is None else power_of_two(gamma)
        with np.errstate(all="ignore"):  # what overflows is found not to be finite
            matrix = self.in_units_of(unit).reduced(None if gamma is None else gamma / unit)
            return smallest_eigenvalue_bound(matrix)

    def in_units_of(self, unit: float) -> Inequality:
        """Return the inequality of the same layer with y in a unit near γ, and every Λ near 1.

        With y = ay′ and z = diag(c)z′ the weights are c⁻¹Wc, c⁻¹U, Cc/a and D/a, γ is γ/a, Λ is
        Λc²/a, and M(Λ, γ)/a its own congruence. a and c are powers of two, so nothing is rounded;
        without them a γ far from 1, or units of very different Λ, could not be proved.

        Args:
            unit: a.
        """
        exponent = math.frexp(unit)[1] - 1
        halves = (exponent - np.frexp(self.Lambda.mid[:, 0])[1]) // 2
        c = np.ldexp(1.0, halves.clip(-1000, 1000))
        D = self.D
        if isinstance(D, Enclosure):
            D = D.scale(1 / unit)
        elif D is not None:
            D = D / unit if abs(D / unit) >= TINY or D == 0 else math.nan  # out of range
        return replace(
            self, W=None if self.W is None else self.W.scale(1 / c, c),
            U=self.U.scale(1 / c, np.ones(self.U.mid.shape[1])),
            C=self.C.scale(np.full(self.C.mid.shape[0], 1 / unit), c), D=D,
            Lambda=self.Lambda.scale(c, np.ones(1)).scale(c / unit, np.ones(1)),
        )  # fmt: skip

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
        d = _identity(1, 0.0 if isinstance(self.D, Enclosure) else self.D or 0.0)
        corner = _identity(1, gamma) - d * d / gamma
        if self.n == 0:
            return corner
        S = self.well_posedness() - self.C.T @ self.C / gamma
        G = self.Lambda * self.U
        if isinstance(self.D, Enclosure):
            return self._assemble(gamma, S, G, self.D)
        if not corner.mid[0, 0] - corner.radius[0, 0] > 0:
            return Enclosure(np.full((1, 1), -math.inf))
        if self.D:
            G = G + d * self.C.T / gamma
        return S - G @ G.T * corner.reciprocal()

    def well_posedness(self) -> Enclosure:
        """2Λ − ΛW − WᵀΛ; 1 without units, where there is nothing to solve."""
        if self.n == 0:
            return _identity(1)
        if self.W is None:
            double = self.Lambda + self.Lambda
            return Enclosure(np.diag(double.mid[:, 0]), np.diag(double.radius[:, 0]))
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
        with np.errstate(all="ignore"):  # for information: what overflows is not finite
            return self._smallest_eigenvalue(gamma)

    def _smallest_eigenvalue(self, gamma: float | None) -> float:
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


def _feedthrough(D: Array) -> Enclosure | float | None:
    """Return the number d if D = dI, and nothing for a matrix without entries."""
    if D.size == 0:
        return None
    square = D.shape[0] == D.shape[1]
    if square and not is_denormal(D).any() and not (D - D[0, 0] * np.eye(len(D))).any():
        return float(D[0, 0])
    return Enclosure(D)


def _vanishes(W: Array) -> bool:
    return not (W.any() or is_denormal(W).any())
