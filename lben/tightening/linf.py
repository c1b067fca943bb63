"""Which weights τ of the inputs show the least bound for inputs measured in linf?

A claim (τ, Λ) says |Δyᵢ − Δyⱼ| ≤ √(Σ τₖ) · max |Δxₖ|; `lben.certificates.linf` proves it.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch

from lben.certificates import CertificateError, Claim, LinfClaim
from lben.certificates.proof import read_exactly
from lben.rigorous import Array
from lben.tightening.diagonal import derive_pair_claim, tighten_pairs
from lben.tightening.layer_program import LayerProgram, minimise_bound
from lben.tightening.scaled import SMALLEST_BOUND, ScaledMultiplier, get_own_claim, proves_own_claim
from lben.weights import DenseWeights

_PROOF_SLACK = 1 + 1e-7


def tighten_linf(
    weights: DenseWeights, *, fix_multiplier: bool = True, gap: float = 1e-3
) -> dict[tuple[int, int], LinfClaim]:
    """Propose the least bound of |Δyᵢ − Δyⱼ| / max |Δxₖ| for every pair of outputs, i < j.

    With fix_multiplier=False none is above √p times the l2 bound that `tighten_pairs` proposes for
    the pair. None is above √(2p) times the l2 bound that the weights claim of all outputs.

    Args:
        weights: of a layer.
        fix_multiplier: take the weights' own Λ times a factor. With P the Schur complement of M on
            the inputs, τ with P ⪯ diag(τ) comes from Gershgorin's circles, τₖ = Σⱼ |Pₖⱼ| qⱼ/qₖ with
            two choices of q > 0, or is λmax(P) for every input. If False, a semidefinite program
            over τ and Λ is solved besides for every pair, whose matrix has n + p rows; the smaller
            bound is proposed.
        gap: relative accuracy of Στ of those programs.

    Returns:
        For every (i, j) a claim (τ, Λ), whose bound is √Στ.

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite, or a bound leaves the range of
            float64.

    Example:
        y₁ − y₂ = σ(x₁) − σ(x₂) changes by at most 2 where each input changes by at most 1.

        >>> import torch
        >>> from lben import DenseWeights
        >>> from lben.tightening import tighten_linf
        >>> eye, zero = torch.eye(2), torch.zeros(2)
        >>> weights = DenseWeights(
        ...     W=0 * eye, U=eye, b=zero, C=eye, D=None, b_y=zero, Lambda=zero + 1, gamma=None
        ... )
        >>> claim = tighten_linf(weights)[0, 1]
        >>> round(float(claim.tau.sum() ** 0.5), 3)
        2.0
    """
    exact = read_exactly(weights)
    q = exact.out_features
    program, in_l2 = _LinfProgram(exact), {}
    if not fix_multiplier:
        in_l2 = tighten_pairs(weights)
    elif proves_own_claim(weights, math.inf):
        whole = derive_pair_claim(get_own_claim(weights))
        in_l2 = {(i, j): whole for i in range(q) for j in range(i + 1, q)}
    claims = {}
    for i in range(q):
        for j in range(i + 1, q):
            c = (exact.C[i] - exact.C[j]).numpy()
            d = np.zeros(exact.in_features)
            if exact.D is not None:
                d = (exact.D[i] - exact.D[j]).numpy()
            found = [program.propose(c, d)]
            if (i, j) in in_l2:
                found.append(_derive_from_l2(in_l2[i, j], exact.in_features))
            if not fix_multiplier and program.depends_on_input(c, d):
                found.append(_solve_program(exact, c, d, gap))
            claims[i, j] = min(found, key=lambda claim: float(claim.tau.sum()))
            if not (np.isfinite(claims[i, j].tau).all() and np.isfinite(claims[i, j].Lambda).all()):
                raise CertificateError(
                    f"the bound of the outputs {i} and {j} in the l∞ norm leaves the range of "
                    "float64: scale the weights U, C and D towards 1"
                )
    return claims


def _derive_from_l2(claim: Claim, inputs: int) -> LinfClaim:
    """Return the claim that a bound γ in l2 implies: τ = γ² for every input, with γΛ."""
    assert claim.gamma is not None
    Lambda = claim.gamma * claim.Lambda.detach().cpu().double().numpy()
    return LinfClaim(tau=np.full(inputs, claim.gamma * claim.gamma), Lambda=Lambda)


class _LinfProgram:
    """The Schur complement of M on the inputs, for Λ times a factor s and one output (c, d).

        P(s) = s ĜᵀĜ + s/(s − kᵀk) (d + Ĝᵀk)(d + Ĝᵀk)ᵀ,

    where S = 2Λ − ΛW − WᵀΛ = LLᵀ, Ĝ = L⁻¹ΛU and k = L⁻¹cᵀ. Units are powers of two: u of U, v of c
    and of d/u, and so uv of the bound.
    """

    def __init__(self, weights: DenseWeights) -> None:
        self._scaled = ScaledMultiplier.of(weights)
        self._Lambda = weights.Lambda.numpy()
        self._gram = self._scaled.G.T @ self._scaled.G
        self._spectrum, self._vectors = np.linalg.eigh(self._gram)

    def depends_on_input(self, c: Array, d: Array) -> bool:
        """Say whether an output depends on x."""
        return bool(d.any() or (c.any() and self._gram.any()))

    def propose(self, c: Array, d: Array) -> LinfClaim:
        """Return the claim of least Στ over a grid of s and the three rules of `_choose_tau`."""
        k, unit = self._scaled.scale_readout(c[None])
        k, u = k[:, 0], self._scaled.drive
        d = d / u
        if d.any():  # one unit for both
            common = max(unit if c.any() else 0.0, 2.0 ** np.frexp(np.abs(d).max())[1])
            k, d, unit = k * (unit / common), d / common, common
        direction = d + self._scaled.G.T @ k
        if not direction.any() and not (k.any() and self._gram.any()):
            return self._claim_constant(len(d), float(k @ k), unit)
        best, factor = np.full(len(d), np.inf), 1.0
        for s in self._choose_factors(float(k @ k), direction):
            tau = self._choose_tau(s, s / (s - float(k @ k)), direction)
            if tau.sum() < best.sum():
                best, factor = tau, s
        tiny = max(1e-12 * float(best.max()), (SMALLEST_BOUND / unit / u) ** 2)
        with np.errstate(over="ignore"):  # an infinite claim is refused
            tau = np.maximum(best, tiny) * _PROOF_SLACK * unit * unit * u * u
        return LinfClaim(tau=tau, Lambda=factor * unit**2 * self._Lambda)

    def _claim_constant(self, inputs: int, reads: float, unit: float) -> LinfClaim:
        """Return a claim next to zero, for an output that does not depend on x.

        It needs sĜᵀĜ ≺ τI and s > ‖k‖², one of which is zero.
        """
        tau, u = (SMALLEST_BOUND * max(unit * self._scaled.drive, 1.0)) ** 2, self._scaled.drive
        top = float(self._spectrum[-1]) if len(self._spectrum) else 0.0
        factor = 2 * reads * unit**2 if reads > 0 or top <= 0 else tau / (2 * top) / u / u
        return LinfClaim(tau=np.full(inputs, tau), Lambda=(factor or 1.0) * self._Lambda)

    def _choose_factors(self, kappa: float, direction: Array) -> Array:
        """Return some s above κ = kᵀk, among them the one with the least λmax(P(s))."""
        reach, top = float(direction @ direction), float(self._spectrum[-1])
        if top <= 0:  # the second term alone: s as large as can be
            return np.array([kappa * 1e6 if kappa > 0 else 1.0])
        if kappa <= 0:  # the first term is to be small
            return np.array([reach / top * 1e-6])
        best = scipy.optimize.minimize_scalar(
            lambda t: np.log(
                self._largest_eigenvalue(kappa * (1 + np.exp(t)), 1 + np.exp(-t), direction)
            ),
            bounds=(-14.0, 14.0), method="bounded", options={"xatol": 1e-5},
        )  # fmt: skip
        near = np.array([np.exp(float(best.x))])
        return np.asarray(kappa * (1 + np.concatenate([near, np.geomspace(0.1, 30, 12)])))

    def _choose_tau(self, s: float, share: float, direction: Array) -> Array:
        """Return the τ of least sum: λmax, or circles with q = 1 or q = |d + Ĝᵀk|."""
        P = np.abs(s * self._gram + share * np.outer(direction, direction))
        size = np.abs(direction)
        tau = np.full(len(direction), self._largest_eigenvalue(s, share, direction))
        for q in (np.ones_like(size), size + 1e-3 * size.max(initial=0.0)):
            if q.all():
                circles = (P @ q) / q
                tau = circles if circles.sum() < tau.sum() else tau
        return tau

    def _largest_eigenvalue(self, s: float, share: float, direction: Array) -> float:
        """Return λmax(P): the largest root of the secular equation of a rank one change."""
        weights = share * (self._vectors.T @ direction) ** 2
        poles = s * self._spectrum
        low, high = float(poles[-1]), float(poles[-1] + weights.sum())

        def excess(x: float) -> float:
            return 1 - float(np.sum(weights / np.maximum(x - poles, 1e-300)))

        start = low + 1e-14 * (high - low)
        if not excess(start) < 0:
            return start + 1e-13 * abs(high)
        found = float(scipy.optimize.brentq(excess, start, high * (1 + 1e-12), rtol=1e-12))
        return found * (1 + 1e-10)


def _solve_program(weights: DenseWeights, c: Array, d: Array, gap: float) -> LinfClaim:
    program = LayerProgram(
        W=weights.W[None], U=weights.U[None], C=torch.from_numpy(c)[None, None],
        D=torch.from_numpy(d)[None, None], per_input=True,
    )  # fmt: skip
    try:
        optimum = minimise_bound(program, weights.Lambda[None], gap=gap)
    except ValueError as error:
        raise CertificateError(str(error)) from error
    return LinfClaim(
        tau=optimum.tau[0].numpy() * _PROOF_SLACK, Lambda=optimum.multiplier[0].numpy()
    )
