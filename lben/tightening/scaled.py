"""Which bound does the layer's own Λ support, up to a common factor?

Note [One number]
Let S = 2Λ − ΛW − WᵀΛ = LLᵀ, K = L⁻¹Cᵀ and B = L⁻¹ΛUUᵀΛL⁻ᵀ. With D = 0 the claim (γ, tΛ) holds where
tS ⪰ CᵀC/γ + t²ΛUUᵀΛ/γ, that is, with s = t/γ, where

    γ² I ⪰ Kᵀ (s(I − sB))⁻¹ K,   0 < s < 1/λmax(B).

In the eigenvectors of B the right side is a sum of terms 1/(s(1 − sβ)), convex in s. So one
factorization, and the least of one function of one number.

Note [Nothing to bound]
If K = 0 or B = 0 then y is constant and every γ > 0 holds. The claim is then `LEAST`, as a
Lipschitz bound of 0 is no number to divide by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize
import torch

from lben.certificates import CertificateError, Claim
from lben.certificates.inequality import Inequality
from lben.certificates.proof import read_exactly
from lben.rigorous import Array, power_of_two
from lben.weights import DenseWeights, PooledWeights
from solvers.operators import Torus

LEAST = 2.0**-500
"""What is claimed of a constant, see Note [Nothing to bound]."""
ROOM = 1 + 1e-7
"""For the proof."""


def tighten_scaled(weights: DenseWeights) -> Claim:
    """Propose the least γ that the weights' own Λ, up to a common factor, supports.

    See Note [One number]. Works for layers that claim no bound (γ None) as well. The result is a
    proposal: `certify` proves it.

    Raises:
        ValueError: if the weights have a feed-through D.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    if not has_no_feedthrough(weights):
        raise ValueError("tighten_scaled needs weights without feed-through D")
    exact = read_exactly(weights)
    return least(weights, [Kept.of(exact).claim(exact.C.numpy())])


def least(weights: DenseWeights, claims: list[Claim]) -> Claim:
    """Return the claim of the least γ, or what the weights claim of themselves, if that holds."""
    best = min(claims, key=_gamma)
    return promised_claim(weights) if promises_less(weights, _gamma(best)) else best


def promised_claim(weights: DenseWeights) -> Claim:
    """Return what the weights claim of themselves; γ None if nothing."""
    return Claim(weights.gamma, weights.Lambda)


def promises_less(weights: DenseWeights, gamma: float) -> bool:
    """Say whether the weights claim a bound of at most γ that can be proved."""
    own = weights.gamma
    if own is None or own > gamma:
        return False
    exact = read_exactly(weights)
    return Inequality.of(exact, exact.Lambda.numpy()).margin(own) > 0


def _gamma(claim: Claim) -> float:
    return math.inf if claim.gamma is None else claim.gamma


def has_no_feedthrough(weights: DenseWeights) -> bool:
    """Say whether y depends on x through z alone."""
    return weights.D is None or not bool((weights.D != 0).any())


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Λ of float64 weights, up to a factor, for any outputs: see Note [One number].

    All is in the metric of Λ and in units: U of `drive`, a power of two.

    Attributes:
        root: Λ^½.
        factor: L of S in that metric.
        vectors: Q with QᵀBQ = diag(β).
        beta: eigenvalues of B, ascending.
        drive: the unit of U.
        G: L⁻¹Λ^½U in that unit.
    """

    root: Array
    factor: Array
    vectors: Array
    beta: Array
    drive: float
    G: Array

    @classmethod
    def of(cls, weights: DenseWeights) -> Kept:
        """Factor S.

        Raises:
            CertificateError: if it is not positive definite.
        """
        root = np.sqrt(weights.Lambda.numpy())
        H = root[:, None] * (np.eye(len(root)) - weights.W.numpy()) / root
        with np.errstate(all="ignore"):
            H = H + H.T
        try:
            factor = scipy.linalg.cholesky(H, lower=True) if len(H) else H
        except (scipy.linalg.LinAlgError, ValueError) as error:
            raise CertificateError("2Λ − ΛW − WᵀΛ is not positive definite") from error
        G = root[:, None] * weights.U.numpy()
        drive = _size(G)
        G = _solved(factor, G / drive)
        beta, vectors = np.linalg.eigh(G @ G.T) if len(H) else (np.zeros(0), H)
        return cls(root=root, factor=factor, vectors=vectors, beta=beta, drive=drive, G=G)

    def readout(self, C: Array) -> tuple[Array, float]:
        """Return L⁻¹Λ^(−½)Cᵀ in a unit, a power of two, and the unit."""
        K = (C / self.root).T
        unit = _size(K)
        return _solved(self.factor, K / unit), unit

    def claim(self, C: Array) -> Claim:
        """Return the best claim for y = Cz."""
        K, unit = self.readout(C)
        K = self.vectors.T @ K

        def square(s: float) -> float:
            scale = np.sqrt(s * (1 - s * self.beta))
            return float(np.linalg.norm(K / scale[:, None], 2)) ** 2

        top = float(self.beta[-1]) if len(self.beta) else 0.0
        gamma, s = least_over_factor(square, float(np.sum(K * K)), top, unit * self.drive)
        # s is in units of drive⁻²; Λ is γ s, in the metric of Λ.
        factor = gamma * s / self.drive / self.drive
        return Claim(gamma, torch.from_numpy(factor * self.root * self.root))


def least_over_factor(
    square: Callable[[float], float], reads: float, top: float, unit: float
) -> tuple[float, float]:
    """Return the least γ over 0 < s < 1/top, with some room, and its s.

    Args:
        square: γ² of s, in units.
        reads: ‖K‖², 0 where nothing is read out.
        top: λmax(B), 0 where nothing drives the units.
        unit: of γ.
    """
    if reads > 0 and top > 0:
        # s = 1/(top(1 + e^−θ)): the ends are where 1 − s·top or s·top is 1e-8.
        def of(theta: float) -> float:
            return 1 / (top * (1 + math.exp(-theta)))

        best = scipy.optimize.minimize_scalar(
            lambda theta: math.log(square(of(theta))), bounds=(-18.0, 18.0), method="bounded",
            options={"xatol": 1e-5},
        )  # fmt: skip
        s = of(float(best.x))
        return max(math.sqrt(square(s)) * unit * ROOM, LEAST), s
    gamma = LEAST * max(unit, 1.0)
    if reads > 0:
        return gamma, 2 * reads * (min(unit, 1.0) / LEAST) ** 2
    return gamma, 1 / (2 * top) if top > 0 else 1.0


def tighten_pooled(weights: PooledWeights) -> Claim:
    """Propose the least γ that Λ, up to a common factor t, supports through a bound of the state.

    With CᵀC ⪯ g²Λ, g = ‖CΛ^(−½)‖₂, the condition is block diagonal over frequencies: it is that of
    Note [One number] at each of them, with gΛ^½ for C. The result is a proposal: `certify_pooled`
    proves it.

    Raises:
        ValueError: if the weights claim a bound of their own.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite at some frequency.
    """
    if weights.gamma is not None:
        raise ValueError(f"the weights claim a bound of their own, {weights.gamma:g}")
    double = read_exactly(weights)
    state = double.state
    root = state.Lambda.sqrt()
    torus = Torus(len(root), *state.grid(weights.image))
    drive = _size(state.U.numpy())
    U = torus.symbols(state.U / drive)
    identity = torch.eye(len(root), dtype=torch.float64, device="cpu")
    W = torch.zeros_like(U @ U.mH) if state.W is None else torus.symbols(state.W)
    H = root[:, None] * (identity - W) / root
    L, failed = torch.linalg.cholesky_ex(H + H.mH)
    if bool((failed != 0).any()):
        raise CertificateError("2Λ − ΛW − WᵀΛ is not positive definite at some frequency")
    G = torch.linalg.solve_triangular(L, root[:, None] * U, upper=False)
    K = torch.linalg.solve_triangular(L, identity.to(L.dtype).expand_as(L), upper=False)
    beta, vectors = torch.linalg.eigh(G @ G.mH)
    K = vectors.mH @ K
    C = (double.C / root[:, None, None]).flatten(1)
    reads = _size(C.numpy())
    gain = float(torch.linalg.matrix_norm(C / reads, 2)) * (1 + 1e-12)

    def square(s: float) -> float:
        scale = (s * (1 - s * beta)).sqrt()
        return gain**2 * float(torch.linalg.matrix_norm(K / scale[:, :, None], 2).max()) ** 2

    norm = float(torch.linalg.matrix_norm(K, 2).max()) ** 2
    gamma, s = least_over_factor(square, gain**2 * norm, float(beta.max()), reads * drive)
    gamma *= 1 + 1e-6
    return Claim(gamma, state.Lambda * (gamma * s / drive / drive))


def _size(matrix: Array) -> float:
    return power_of_two(float(np.max(np.abs(matrix), initial=0.0)))


def _solved(factor: Array, right: Array) -> Array:
    if not right.size:
        return right
    return np.asarray(scipy.linalg.solve_triangular(factor, right, lower=True))
