"""Which weights of the inputs show the least bound in the l∞ norm?"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch

from lben.certificates import CertificateError, Claim, LinfClaim
from lben.certificates.proof import read_exactly
from lben.rigorous import Array
from lben.tightening.diagonal import pair_claim, tighten_pairs
from lben.tightening.interior_point import Program, minimise
from lben.tightening.scaled import LEAST, Kept, promised_claim, promises_less
from lben.weights import DenseWeights

_ROOM = 1 + 1e-7


def tighten_linf(
    weights: DenseWeights, *, fix_multiplier: bool = True, gap: float = 1e-3
) -> dict[tuple[int, int], LinfClaim]:
    """Propose a bound of |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| for every pair of outputs, i < j.

    None is above √p times the bound in l2 that `tighten_pairs` proposes for the pair, with Λ kept
    (where there is no D) or not; nor above √2p times what the weights claim of all outputs.

    Args:
        weights: of a layer.
        fix_multiplier: keep Λ up to a factor, and take τ from Gershgorin's circles: with
            P ⪯ diag(τ), τₖ = Σⱼ |Pₖⱼ| qⱼ/qₖ, or λmax(P) for all. Otherwise a semidefinite program
            over τ and Λ for every pair, with a matrix as large as units and inputs together; the
            less of both is proposed.
        gap: relative accuracy of Στ of those programs.

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite, or a bound leaves the range of
            float64.
    """
    exact = read_exactly(weights)
    q = exact.out_features
    kept, in_l2 = _LinfProgram(exact), {}
    if not fix_multiplier:
        in_l2 = tighten_pairs(weights)
    elif promises_less(weights, math.inf):
        whole = pair_claim(promised_claim(weights))
        in_l2 = {(i, j): whole for i in range(q) for j in range(i + 1, q)}
    claims = {}
    for i in range(q):
        for j in range(i + 1, q):
            c = (exact.C[i] - exact.C[j]).numpy()
            d = np.zeros(exact.in_features)
            if exact.D is not None:
                d = (exact.D[i] - exact.D[j]).numpy()
            found = [kept.claim(c, d)]
            if (i, j) in in_l2:
                found.append(_uniform(in_l2[i, j], exact.in_features))
            if not fix_multiplier and kept.moves(c, d):
                found.append(_optimal(exact, c, d, gap))
            claims[i, j] = min(found, key=lambda claim: float(claim.tau.sum()))
            if not (np.isfinite(claims[i, j].tau).all() and np.isfinite(claims[i, j].Lambda).all()):
                raise CertificateError(
                    f"the bound of the outputs {i} and {j} in the l∞ norm leaves the range of "
                    "float64: scale the weights U, C and D towards 1"
                )
    return claims


def _uniform(claim: Claim, inputs: int) -> LinfClaim:
    """Return what a bound γ in l2 says: τ = γ² for every input, with γΛ."""
    assert claim.gamma is not None
    Lambda = claim.gamma * claim.Lambda.detach().cpu().double().numpy()
    return LinfClaim(tau=np.full(inputs, claim.gamma * claim.gamma), Lambda=Lambda)


class _LinfProgram:
    """Λ up to a factor s: P(s) = s ĜᵀĜ + s/(s − kᵀk) (d + Ĝᵀk)(d + Ĝᵀk)ᵀ.

    Here S = 2Λ − ΛW − WᵀΛ = LLᵀ, Ĝ = L⁻¹ΛU and k = L⁻¹cᵀ: the Schur complement of M for one output.
    It is written in units: u of U, v of c and d/u, so of uv for the bound.
    """

    def __init__(self, weights: DenseWeights) -> None:
        self._kept = Kept.of(weights)
        self._Lambda = weights.Lambda.numpy()
        self._gram = self._kept.G.T @ self._kept.G
        self._spectrum, self._vectors = np.linalg.eigh(self._gram)

    def moves(self, c: Array, d: Array) -> bool:
        """Say whether an output depends on x."""
        return bool(d.any() or (c.any() and self._gram.any()))

    def claim(self, c: Array, d: Array) -> LinfClaim:
        """Return the best claim over a grid of s: with q = 1, with q = |d + Ĝᵀk|, and λmax."""
        k, unit = self._kept.readout(c[None])
        k, u = k[:, 0], self._kept.drive
        d = d / u
        if d.any():  # one unit for both
            common = max(unit if c.any() else 0.0, 2.0 ** np.frexp(np.abs(d).max())[1])
            k, d, unit = k * (unit / common), d / common, common
        direction = d + self._kept.G.T @ k
        if not direction.any() and not (k.any() and self._gram.any()):
            return self._constant(len(d), float(k @ k), unit)
        best, factor = np.full(len(d), np.inf), 1.0
        for s in self._grid(float(k @ k), direction):
            tau = self._tau(s, s / (s - float(k @ k)), direction)
            if tau.sum() < best.sum():
                best, factor = tau, s
        tiny = max(1e-12 * float(best.max()), (LEAST / unit / u) ** 2)
        with np.errstate(over="ignore"):  # an infinite claim is refused
            tau = np.maximum(best, tiny) * _ROOM * unit * unit * u * u
        return LinfClaim(tau=tau, Lambda=factor * unit**2 * self._Lambda)

    def _constant(self, inputs: int, reads: float, unit: float) -> LinfClaim:
        """Claim next to nothing of an output that does not move.

        sĜᵀĜ must be below τ and s above ‖k‖², one of which is zero.
        """
        tau, u = (LEAST * max(unit * self._kept.drive, 1.0)) ** 2, self._kept.drive
        top = float(self._spectrum[-1]) if len(self._spectrum) else 0.0
        factor = 2 * reads * unit**2 if reads > 0 or top <= 0 else tau / (2 * top) / u / u
        return LinfClaim(tau=np.full(inputs, tau), Lambda=(factor or 1.0) * self._Lambda)

    def _grid(self, kappa: float, direction: Array) -> Array:
        """Return some s above κ, that with the least λmax among them."""
        reach, top = float(direction @ direction), float(self._spectrum[-1])
        if top <= 0:  # the second term alone: s as large as can be
            return np.array([kappa * 1e6 if kappa > 0 else 1.0])
        if kappa <= 0:  # the first term is to be small
            return np.array([reach / top * 1e-6])
        best = scipy.optimize.minimize_scalar(
            lambda t: np.log(self._top(kappa * (1 + np.exp(t)), 1 + np.exp(-t), direction)),
            bounds=(-14.0, 14.0), method="bounded", options={"xatol": 1e-5},
        )  # fmt: skip
        near = np.array([np.exp(float(best.x))])
        return np.asarray(kappa * (1 + np.concatenate([near, np.geomspace(0.1, 30, 12)])))

    def _tau(self, s: float, share: float, direction: Array) -> Array:
        """Return the least τ with P ⪯ diag(τ) that the three rules find."""
        P = np.abs(s * self._gram + share * np.outer(direction, direction))
        size = np.abs(direction)
        tau = np.full(len(direction), self._top(s, share, direction))
        for q in (np.ones_like(size), size + 1e-3 * size.max(initial=0.0)):
            if q.all():
                circles = (P @ q) / q
                tau = circles if circles.sum() < tau.sum() else tau
        return tau

    def _top(self, s: float, share: float, direction: Array) -> float:
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


def _optimal(weights: DenseWeights, c: Array, d: Array, gap: float) -> LinfClaim:
    program = Program(
        W=weights.W[None], U=weights.U[None], C=torch.from_numpy(c)[None, None],
        D=torch.from_numpy(d)[None, None], per_input=True,
    )  # fmt: skip
    try:
        optimum = minimise(program, weights.Lambda[None], gap=gap)
    except ValueError as error:
        raise CertificateError(str(error)) from error
    return LinfClaim(tau=optimum.tau[0].numpy() * _ROOM, Lambda=optimum.multiplier[0].numpy())
