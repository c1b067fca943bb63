"""Which bound does the layer's own Λ support, times a common factor?

Symbols: docs/glossary.md.

Note [One number]
Let S = 2Λ − ΛW − WᵀΛ = LLᵀ, K = L⁻¹Cᵀ and B = L⁻¹ΛUUᵀΛL⁻ᵀ. With D = 0 the Schur complement of M
says that the claim (γ, tΛ) holds if tS ⪰ CᵀC/γ + t²ΛUUᵀΛ/γ. With s = t/γ that is

    γ² I ⪰ Kᵀ (s(I − sB))⁻¹ K,   0 < s < 1/λmax(B).

In the eigenvectors of B, with eigenvalues β, the right side is a sum of terms 1/(s(1 − sβ)), each
convex in s. So one factorization is needed, and the minimum of one function of one number.

Note [Nothing to bound]
If K = 0 or B = 0 then y is constant and every γ > 0 holds. The claim is then `SMALLEST_BOUND`,
since margins are divided by a Lipschitz bound, and 0 is no divisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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

SMALLEST_BOUND = 2.0**-500
"""γ of a constant output, see Note [Nothing to bound]."""
PROOF_SLACK = 1 + 1e-7
"""Factor of a proposed γ, so that floating point can prove it."""


def tighten_scaled(weights: DenseWeights) -> Claim:
    """Propose the least γ that the weights' own Λ, times a common factor, supports.

    The largest generalised eigenvalue of Note [One number]. Weights that claim no bound (γ None)
    have a proposal too. It is a proposal: `certify` proves it.

    Args:
        weights: of a layer without feed-through, with or without a claim.

    Returns:
        γ, an l2 Lipschitz constant of x ↦ y, and the multiple of Λ that shows it.

    Raises:
        ValueError: if the weights have a feed-through D.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Example:
        y = ½σ(x) claims γ = 3, and supports ½.

        >>> import torch
        >>> from lben import DenseWeights, certify
        >>> from lben.tightening import tighten_scaled
        >>> one, zero = torch.ones(1, 1), torch.zeros(1)
        >>> weights = DenseWeights(
        ...     W=0 * one, U=one, b=zero, C=0.5 * one, D=None, b_y=zero, Lambda=one[0], gamma=3.0
        ... )
        >>> claim = tighten_scaled(weights)
        >>> round(claim.gamma, 3), certify(weights, claim).bound == claim.gamma
        (0.5, True)
    """
    if not lacks_feedthrough(weights):
        raise ValueError(
            "tighten_scaled needs weights without feed-through D, and these have one: use "
            "tighten_diagonal"
        )
    exact = read_exactly(weights)
    return choose_least_claim(weights, [ScaledMultiplier.of(exact).propose(exact.C.numpy())])


def choose_least_claim(weights: DenseWeights, claims: list[Claim]) -> Claim:
    """Return the claim of least γ, or the weights' own claim where it is smaller and holds.

    Its gap is what the claims with a gap tell of the least bound.
    """
    best = min(claims, key=_bound_or_infinity)
    if proves_own_claim(weights, _bound_or_infinity(best)):
        best = get_own_claim(weights)
    least = [c.gamma * (1 - c.gap) for c in claims if c.gamma is not None and c.gap is not None]
    if best.gamma is None or not least:
        return best
    return replace(best, gap=max(0.0, 1 - max(least) / best.gamma))


def get_own_claim(weights: DenseWeights) -> Claim:
    """Return the (γ, Λ) that the weights claim of themselves; γ is None if they claim no bound."""
    return Claim(weights.gamma, weights.Lambda)


def proves_own_claim(weights: DenseWeights, gamma: float) -> bool:
    """Return whether the weights claim a bound of at most γ, and it can be proved."""
    own = weights.gamma
    if own is None or own > gamma:
        return False
    exact = read_exactly(weights)
    return Inequality.of(exact, exact.Lambda.numpy()).margin(own) > 0


def _bound_or_infinity(claim: Claim) -> float:
    return math.inf if claim.gamma is None else claim.gamma


def lacks_feedthrough(weights: DenseWeights) -> bool:
    """Return whether y = Cz + b_y, without Dx."""
    return weights.D is None or not bool((weights.D != 0).any())


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledMultiplier:
    """The weights' own Λ times a factor, factored once for any outputs: see Note [One number].

    Coordinates are those of the metric Λ, z′ = Λ^½z. There S is H + Hᵀ, and U is Λ^½U, measured in
    a unit, a power of two.

    Attributes:
        root: the diagonal of Λ^½, n numbers.
        factor: L with LLᵀ = H + Hᵀ, n × n.
        vectors: Q with QᵀBQ = diag(β), n × n.
        beta: β, the eigenvalues of B, ascending.
        drive: the unit of U.
        G: L⁻¹Λ^½U in that unit, n × p.
    """

    root: Array
    factor: Array
    vectors: Array
    beta: Array
    drive: float
    G: Array

    @classmethod
    def of(cls, weights: DenseWeights) -> ScaledMultiplier:
        """Factor S of float64 weights.

        Raises:
            CertificateError: if S = 2Λ − ΛW − WᵀΛ is not positive definite.
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
        drive = _choose_unit(G)
        G = _solve_lower(factor, G / drive)
        beta, vectors = np.linalg.eigh(G @ G.T) if len(H) else (np.zeros(0), H)
        return cls(root=root, factor=factor, vectors=vectors, beta=beta, drive=drive, G=G)

    def scale_readout(self, C: Array) -> tuple[Array, float]:
        """Return K = L⁻¹Λ^(−½)Cᵀ, n × q, in a unit that is a power of two, and the unit."""
        K = (C / self.root).T
        unit = _choose_unit(K)
        return _solve_lower(self.factor, K / unit), unit

    def propose(self, C: Array) -> Claim:
        """Return the claim of least γ for y = Cz, with C q × n."""
        K, unit = self.scale_readout(C)
        K = self.vectors.T @ K

        def square(s: float) -> float:
            scale = np.sqrt(s * (1 - s * self.beta))
            return float(np.linalg.norm(K / scale[:, None], 2)) ** 2

        top = float(self.beta[-1]) if len(self.beta) else 0.0
        gamma, s = minimise_over_factor(square, float(np.sum(K * K)), top, unit * self.drive)
        # s is in units of drive⁻²; Λ is γ s, in the metric of Λ.
        factor = gamma * s / self.drive / self.drive
        return Claim(gamma, torch.from_numpy(factor * self.root * self.root))


def minimise_over_factor(
    square: Callable[[float], float], reads: float, top: float, unit: float
) -> tuple[float, float]:
    """Return the least γ over 0 < s < 1/top, times `PROOF_SLACK`, and its s.

    Args:
        square: γ²(s) divided by unit².
        reads: ‖K‖²; 0 where no unit is read out.
        top: λmax(B); 0 where no input reaches a unit.
        unit: the unit of γ.
    """
    if reads > 0 and top > 0:
        # s = 1/(top(1 + e^−θ)): the ends are where 1 − s·top or s·top is 1e-8.
        def factor_at(theta: float) -> float:
            return 1 / (top * (1 + math.exp(-theta)))

        best = scipy.optimize.minimize_scalar(
            lambda theta: math.log(square(factor_at(theta))), bounds=(-18.0, 18.0),
            method="bounded", options={"xatol": 1e-5},
        )  # fmt: skip
        s = factor_at(float(best.x))
        return max(math.sqrt(square(s)) * unit * PROOF_SLACK, SMALLEST_BOUND), s
    gamma = SMALLEST_BOUND * max(unit, 1.0)
    if reads > 0:
        return gamma, 2 * reads * (min(unit, 1.0) / SMALLEST_BOUND) ** 2
    return gamma, 1 / (2 * top) if top > 0 else 1.0


def tighten_pooled(weights: PooledWeights) -> Claim:
    """Propose the least γ that Λ, times a common factor, supports through a bound of the state.

    Let g = ‖CΛ^(−½)‖₂. Since CᵀC ⪯ g²Λ, the condition with gΛ^½ in place of C is sufficient, and it
    is block diagonal over frequencies: Note [One number] at each of them. The result is a proposal:
    `certify_pooled` proves it.

    Args:
        weights: kernels and a matrix behind pooling, without a claim (γ None).

    Returns:
        γ, an l2 Lipschitz constant of x ↦ y, and the multiple of Λ, one number per channel.

    Raises:
        ValueError: if the weights claim a bound of their own.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite at some frequency.

    Example:
        >>> import torch
        >>> from lben.parameterizations import PooledParameterization
        >>> from lben.tightening import tighten_pooled
        >>> _ = torch.manual_seed(0)
        >>> free = PooledParameterization(1, 2, 3, image=(4, 4), gamma=None, dtype=torch.float64)
        >>> claim = tighten_pooled(free().apply(torch.Tensor.detach))
        >>> claim.gamma > 0, tuple(claim.Lambda.shape)
        (True, (2,))
    """
    if weights.gamma is not None:
        raise ValueError(
            f"the weights claim a bound of their own, {weights.gamma:g}: certify proves it as it is"
        )
    double = read_exactly(weights)
    state = double.state
    root = state.Lambda.sqrt()
    torus = Torus(len(root), *state.grid(weights.image))
    drive = _choose_unit(state.U.numpy())
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
    reads = _choose_unit(C.numpy())
    gain = float(torch.linalg.matrix_norm(C / reads, 2)) * (1 + 1e-12)

    def square(s: float) -> float:
        scale = (s * (1 - s * beta)).sqrt()
        return gain**2 * float(torch.linalg.matrix_norm(K / scale[:, :, None], 2).max()) ** 2

    norm = float(torch.linalg.matrix_norm(K, 2).max()) ** 2
    gamma, s = minimise_over_factor(square, gain**2 * norm, float(beta.max()), reads * drive)
    gamma *= 1 + 1e-6
    return Claim(gamma, state.Lambda * (gamma * s / drive / drive))


def _choose_unit(matrix: Array) -> float:
    return power_of_two(float(np.max(np.abs(matrix), initial=0.0)))


def _solve_lower(factor: Array, right: Array) -> Array:
    if not right.size:
        return right
    return np.asarray(scipy.linalg.solve_triangular(factor, right, lower=True))
