"""Which weights of the inputs show the least bound in the largest norm?"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from lben.certificates import CertificateError
from lben.certificates.largest import LargestClaim
from lben.rigorous import Array
from lben.tightening.semidefinite import Program, minimise
from lben.weights import ExplicitWeights

_ROOM = 1 + 1e-7


def tighten_largest(
    weights: ExplicitWeights, *, keep_multiplier: bool = True, gap: float = 1e-3
) -> dict[tuple[int, int], LargestClaim]:
    """Propose a bound of |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| for every pair of outputs, i < j.

    Args:
        weights: of a layer.
        keep_multiplier: keep Λ up to a factor, and take τ from Gershgorin's circles: with
            P ⪯ diag(τ), τₖ = Σⱼ |Pₖⱼ| qⱼ/qₖ. Otherwise a semidefinite program over τ and Λ for
            every pair, with a matrix as large as units and inputs together.
        gap: relative accuracy of Στ of those programs.

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    exact = weights.to(torch.float64)
    q = exact.out_features
    kept = _Kept(exact)
    claims = {}
    for i in range(q):
        for j in range(i + 1, q):
            c = (exact.C[i] - exact.C[j]).numpy()
            d = np.zeros(exact.in_features)
            if exact.D is not None:
                d = (exact.D[i] - exact.D[j]).numpy()
            claim = kept.claim(c, d)
            claims[i, j] = claim if keep_multiplier else _optimal(exact, c, d, gap)
    return claims


class _Kept:
    """Λ up to a factor s: P(s) = s ĜᵀĜ + s/(s − kᵀk) (d + Ĝᵀk)(d + Ĝᵀk)ᵀ.

    Here S = 2Λ − ΛW − WᵀΛ = LLᵀ, Ĝ = L⁻¹ΛU and k = L⁻¹cᵀ: the Schur complement of M for one output.
    """

    def __init__(self, weights: ExplicitWeights) -> None:
        self._Lambda = weights.Lambda.numpy()
        weighted = self._Lambda[:, None] * weights.W.numpy()
        S = 2 * np.diag(self._Lambda) - weighted - weighted.T
        try:
            self._root = scipy.linalg.cholesky(S, lower=True)
        except scipy.linalg.LinAlgError as error:
            raise CertificateError("2Λ − ΛW − WᵀΛ is not positive definite") from error
        G = self._Lambda[:, None] * weights.U.numpy()
        self._G = scipy.linalg.solve_triangular(self._root, G, lower=True)
        self._gram = self._G.T @ self._G

    def claim(self, c: Array, d: Array) -> LargestClaim:
        """Return the best claim over a grid of s, with q = 1 and with q = |d + Ĝᵀk|."""
        k = scipy.linalg.solve_triangular(self._root, c, lower=True)
        kappa, direction = float(k @ k), d + self._G.T @ k
        best, factor = None, 1.0
        weighted = np.abs(direction)
        candidates = [np.ones_like(weighted), weighted + 1e-3 * weighted.max()]
        for s in kappa * (1 + np.geomspace(0.1, 30, 12)):
            P = np.abs(s * self._gram + s / (s - kappa) * np.outer(direction, direction))
            for q in candidates:
                tau = (P @ q) / q
                if best is None or tau.sum() < best.sum():
                    best, factor = tau, s
        assert best is not None
        tiny = 1e-12 * best.max()
        return LargestClaim(tau=np.maximum(best, tiny) * _ROOM, Lambda=factor * self._Lambda)


def _optimal(weights: ExplicitWeights, c: Array, d: Array, gap: float) -> LargestClaim:
    program = Program(
        W=weights.W[None], U=weights.U[None], C=torch.from_numpy(c)[None, None],
        D=torch.from_numpy(d)[None, None], per_input=True,
    )  # fmt: skip
    optimum = minimise(program, weights.Lambda[None], gap=gap)
    return LargestClaim(tau=optimum.tau[0].numpy() * _ROOM, Lambda=optimum.multiplier[0].numpy())
