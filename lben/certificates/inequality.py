"""What is M(Λ, γ), and what does it prove?

Symbols: docs/glossary.md. Let z = σ(Wz + Ux + b) and y = Cz + Dx + b_y with n units, p inputs and q
outputs, and let σ act on each unit with slopes in [0, 1]. For a diagonal Λ ≻ 0 and γ > 0,

                p                        n
    M(Λ, γ) = [ γI − DᵀD/γ              −(UᵀΛ + DᵀC/γ)             ]  p
              [ −(UᵀΛ + DᵀC/γ)ᵀ          2Λ − ΛW − WᵀΛ − CᵀC/γ     ]  n .

Theorem. If 2Λ − ΛW − WᵀΛ ≻ 0, then for every x there is exactly one equilibrium z. If besides
M(Λ, γ) ⪰ 0, then ‖Δy‖₂ ≤ γ‖Δx‖₂ for any two inputs, where Δ is the difference of their values.
(Revay, Wang and Manchester 2020, "Lipschitz bounded equilibrium networks", Theorem 1 for the
equilibrium and Theorem 2 for the bound, where D = 0.) If M(Λ, γ) ≻ 0, both follow: its lower right
block is 2Λ − ΛW − WᵀΛ − CᵀC/γ ≻ 0, and CᵀC/γ ⪰ 0.

Proof. Let v = Wz + Ux + b, so Δv = WΔz + UΔx.

1. Sector condition. σ has slopes in [0, 1], so Δzᵢ = sᵢΔvᵢ with sᵢ in [0, 1] in every unit. Hence
   Δzᵢ(Δvᵢ − Δzᵢ) = sᵢ(1 − sᵢ)Δvᵢ² ≥ 0, and their sum with weights λᵢ > 0 is ΔzᵀΛ(Δv − Δz) ≥ 0.
2. Quadratic form. Multiplying out, with Δy = CΔz + DΔx,

       [Δx; Δz]ᵀ M(Λ, γ) [Δx; Δz] = γ‖Δx‖₂² − ‖Δy‖₂²/γ − 2ΔzᵀΛ(Δv − Δz).

   If M(Λ, γ) ⪰ 0, the left side is at least 0, and by 1. so is the last term with its factor 2. So
   γ‖Δx‖₂² ≥ ‖Δy‖₂²/γ, which is the bound.
3. Equilibrium. 2Λ − ΛW − WᵀΛ ≻ 0 says that z ↦ (I − W)z is strongly monotone in the inner product
   ⟨·, Λ·⟩. In it σ is the proximal operator of a separable convex function f. So z is an
   equilibrium if and only if 0 ∈ (I − W)z − Ux − b + ∂f(z), and a strongly monotone inclusion has
   exactly one solution. ∎

This is the only place where the inequality is evaluated, with every rounding enclosed: dense layers
evaluate it once, convolutional ones at every frequency.
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
    """The matrices of which M(Λ, γ) is made, enclosed, for one set of weights.

    Args:
        W: n × n, or None for a feed-forward layer (W = 0).
        U: n × p.
        C: q × n.
        D: q × p; a number d for D = dI; None for no feed-through.
        Lambda: n × 1 positive numbers, exact until they are scaled.

    Example:
        z = σ(2x), y = z has the Lipschitz constant 2: M(Λ, 1.9) is positive definite for no Λ.

        >>> import torch
        >>> from lben import DenseWeights
        >>> from lben.certificates.inequality import Inequality
        >>> one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> weights = DenseWeights(
        ...     W=0 * one, U=2 * one, b=zero, C=one, D=None, b_y=zero, Lambda=one[0], gamma=None
        ... )
        >>> inequality = Inequality.of(weights, weights.Lambda.numpy() / 2)
        >>> inequality.margin(2.1) > 0, inequality.margin(1.9) > 0
        (True, False)
        >>> inequality.reduced(2.5).mid
        array([[0.2]])
    """

    W: Enclosure | None
    U: Enclosure
    C: Enclosure
    D: Enclosure | float | None
    Lambda: Enclosure

    @classmethod
    def of(cls, weights: DenseWeights, Lambda: Array) -> Inequality:
        """Return the inequality of float64 weights on the CPU, for a multiplier of n numbers."""
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
        """The number of units."""
        return self.U.mid.shape[0]

    def margin(self, gamma: float | None) -> float:
        """Return a proved lower bound of the smallest eigenvalue of `reduced`.

        Positive says that M(Λ, γ) ≻ 0 is proved; for γ None, that 2Λ − ΛW − WᵀΛ ≻ 0 is. The
        eigenvalue is one in the units of `in_units_of`.

        Args:
            gamma: γ, or None for the equilibrium alone.

        Returns:
            The bound; −inf where numbers leave the range of float64.
        """
        if gamma is not None and not TINY <= gamma < math.inf:
            return -math.inf
        unit = 1.0 if gamma is None else power_of_two(gamma)
        with np.errstate(all="ignore"):  # what overflows is found not to be finite
            matrix = self.in_units_of(unit).reduced(None if gamma is None else gamma / unit)
            return smallest_eigenvalue_bound(matrix)

    def in_units_of(self, unit: float) -> Inequality:
        """Return the inequality of the same layer with y in a unit a near γ, and every Λ near 1.

        With y = ay′ and z = diag(c)z′, the weights of x ↦ y′ are c⁻¹Wc, c⁻¹U, Cc/a and D/a, its
        bound is γ/a, and its multiplier Λc²/a. Its matrix is diag(I, c) M(Λ, γ) diag(I, c)/a, a
        congruence: one is positive definite if and only if the other is. a and c are powers of two,
        so nothing is rounded. Without them a γ far from 1, or units of very different Λ, could not
        be proved.

        Args:
            unit: a, a power of two.
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
        """Return the smallest matrix that is positive definite if and only if M(Λ, γ) is.

        - γ None: 2Λ − ΛW − WᵀΛ, n × n, which is the lower right block without C;
        - D = dI or absent: the Schur complement of the upper left block (γ − d²/γ)I in M(Λ, γ),
          2Λ − ΛW − WᵀΛ − CᵀC/γ − GGᵀ/(γ − d²/γ) with G = ΛU + dCᵀ/γ, n × n; a matrix of −inf where
          that block is not positive;
        - no units: the upper left block γI − DᵀD/γ, p × p, or γI − DDᵀ/γ, q × q, if q ≤ p;
        - otherwise M(Λ, γ) itself, (p + n) × (p + n).
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
        """Return 2Λ − ΛW − WᵀΛ, the lower right block without C; 1 if there are no units."""
        if self.n == 0:
            return _identity(1)
        if self.W is None:
            double = self.Lambda + self.Lambda
            return Enclosure(np.diag(double.mid[:, 0]), np.diag(double.radius[:, 0]))
        weighted = self.Lambda * (_identity(self.n) - self.W)
        return weighted + weighted.T

    def monotonicity(self) -> float:
        """Return m: a proved lower bound of λmin(sym H), at least 0; 1 for W = 0.

        H = Λ^½(I − W)Λ^(−½), and 2 sym H is 2Λ − ΛW − WᵀΛ scaled by Λ^(−½) on both sides.
        """
        if self.W is None:
            return 1.0
        return max(down(smallest_eigenvalue_bound(self._H())), 0.0)

    def norm(self) -> float:
        """Return L: a proved upper bound of ‖H‖₂, H = Λ^½(I − W)Λ^(−½); 1 for W = 0."""
        return 1.0 if self.W is None else norm_bound(self._H())

    def output_gain(self) -> float:
        """Return a proved upper bound of ‖CΛ^(−½)‖₂: ‖Δy‖₂ ≤ ‖CΛ^(−½)‖₂‖Δz‖_Λ at equal x."""
        if self.C.mid.size == 0:
            return 0.0
        return norm_bound(self.C * self.Lambda.sqrt().reciprocal().T)

    def smallest_eigenvalue(self, gamma: float | None) -> float:
        """Compute λmin of M(Λ, γ), or of 2Λ − ΛW − WᵀΛ for γ None; for information, not proved.

        Inputs are first reduced: M acts as γI on inputs orthogonal to the rows of U and D, so where
        there are more inputs than rows, coordinates in an orthonormal basis of the rows replace
        them. For D = dI, M acts as (γ − d²/γ)I on inputs orthogonal to the rows of U and C.
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
        """Return M(Λ, γ) from its lower right block S and G = ΛU."""
        corner = _identity(D.mid.shape[1], gamma) - D.T @ D / gamma
        side = -(G.T + D.T @ self.C / gamma)
        return block([[corner, side], [side.T, S]])

    def _H(self) -> Enclosure:
        """Return H = Λ^½(I − W)Λ^(−½); 2 sym H = Λ^(−½)(2Λ − ΛW − WᵀΛ)Λ^(−½)."""
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
