"""What can be proved near one input, where the slopes of σ are known better than [0, 1]?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lben.certificates.records import CertificateError
from lben.inequality import Inequality
from lben.rigorous import Array, Enclosure, smallest_eigenvalue_bound


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalClaim:
    """That outputs change by at most γ‖Δx‖₂ where the slopes of σ lie in [low, high].

    Attributes:
        gamma: γ.
        Lambda: the multiplier that is said to show it, n positive numbers.
        low, high: n numbers each in [0, 1].
    """

    gamma: float
    Lambda: Array
    low: Array
    high: Array


def holds_locally(W: Array, U: Array, C: Enclosure, D: Enclosure, claim: LocalClaim) -> bool:
    """Say whether a local claim can be proved for z = σ(Wz + Ux + b), y = Cz + Dx + b_y.

    Args:
        W: n × n, exact.
        U: n × k, exact.
        C: q × n.
        D: q × k.
        claim: what is to be proved, by `Inequality` with slopes.
    """
    if not (np.isfinite(claim.Lambda).all() and (claim.Lambda > 0).all() and claim.gamma > 0):
        return False
    block = Inequality(
        W=Enclosure(W),
        U=Enclosure(U),
        C=C,
        D=D,
        Lambda=Enclosure(claim.Lambda[:, None]),
        slopes=(Enclosure(claim.low[:, None]), Enclosure(claim.high[:, None])),
    )
    T = Enclosure(_coordinates(W, U, claim))
    matrix = T.T @ (block.reduced(claim.gamma) @ T)
    diagonal = matrix.mid.diagonal()
    if not (np.isfinite(diagonal).all() and (diagonal > 0).all()):
        return False
    root = np.ldexp(1.0, -(np.frexp(diagonal)[1] // 2))
    scale = root[:, None] * root  # exact, as in `Inequality.margin`
    return smallest_eigenvalue_bound(Enclosure(matrix.mid * scale, matrix.radius * scale)) > 0


def _coordinates(W: Array, U: Array, claim: LocalClaim) -> Array:
    """Return T with (x, z) = T(x, z̃), z = low·v + (high − low)·z̃.

    Where high − low is small M has entries like its inverse square, which cancel; in z̃ it has not.
    If TᵀMT is positive definite then T has an inverse, and so is M, whatever T is.
    """
    n, k = U.shape
    low, width = claim.low[:, None], (claim.high - claim.low)[:, None]
    inner = np.linalg.inv(np.eye(n) - W * claim.low)
    return np.block(
        [[np.eye(k), np.zeros((k, n))],
         [low * (inner @ U), low * (inner @ (W * width.T)) + np.diag(width[:, 0])]]
    )  # fmt: skip


def fewer_inputs(rows: Array) -> Array:
    """Return a k × k lower triangle R such that every Ax with ‖x‖ ≤ 1 is Ry for some ‖y‖ ≤ 1.

    By Douglas' lemma that is AAᵀ ⪯ RRᵀ, which is proved. R is the Cholesky factor of AAᵀ, enlarged
    by the rounding, so a bound for inputs through R is one for inputs through A, and hardly more.

    Args:
        rows: A, k × p; U and D of a layer, one below the other.

    Raises:
        CertificateError: if no factor could be proved.
    """
    if not rows.any():
        return np.zeros((len(rows), len(rows)))
    norms = np.linalg.norm(rows, axis=1)
    # An exact scaling: rows of very different size are enlarged alike.
    scale = np.ldexp(1.0, -np.frexp(norms)[1])[:, None]
    exact = Enclosure(scale * rows)
    gram = exact @ exact.T
    slack = 8 * len(rows) * float(gram.radius.max()) + 2.0**-48
    for _ in range(6):
        R, info = scipy.linalg.lapack.dpotrf(gram.mid + slack * np.eye(len(rows)), lower=1, clean=1)
        if info == 0:
            factor = Enclosure(R)
            if smallest_eigenvalue_bound(factor @ factor.T - gram) >= 0:
                triangle: Array = R / scale
                return triangle
        slack *= 16
    raise CertificateError("the inputs of a layer could not be reduced: U is not finite")
