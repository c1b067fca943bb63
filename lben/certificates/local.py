"""What can be proved near one input, where the slopes of σ are known better than [0, 1]?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lben.certificates.certificate import CertificateError
from lben.certificates.inequality import Inequality
from lben.certificates.proof import numbers_of
from lben.rigorous import (
    TINY,
    Array,
    Enclosure,
    block,
    is_denormal,
    smallest_eigenvalue_bound,
    solve,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalClaim:
    """That outputs change by at most γ‖Δx‖₂ where the slopes of σ lie in [low, high].

    Attributes:
        gamma: γ.
        Lambda: the multiplier of z̃ that is said to show it, n positive numbers.
        low, high: n numbers each in [0, 1].
    """

    gamma: float
    Lambda: Array
    low: Array
    high: Array


def is_proved_locally(W: Array, U: Array, C: Enclosure, D: Enclosure, claim: LocalClaim) -> bool:
    """Say whether a local claim can be proved for z = σ(Wz + Ux + b), y = Cz + Dx + b_y.

    The new unknown z̃ with z = low·v + (high − low)·z̃ has slopes in [0, 1] in v = Wz + Ux, and
    (I − W low) v = W (high − low) z̃ + Ux. So the claim is M(Λ, γ) ≻ 0 for the weights of z̃, which
    are enclosed.

    Args:
        W: n × n, exact.
        U: n × k, exact.
        C: q × n.
        D: q × k.
        claim: what is to be proved.
    """
    n = len(W)
    Lambda, lower, upper = (
        numbers_of(name, values, n)
        for name, values in (("Λ", claim.Lambda), ("low", claim.low), ("high", claim.high))
    )
    slopes = bool(((lower >= 0) & (lower <= upper) & (upper <= 1)).all())
    if not (slopes and np.isfinite(Lambda).all() and (Lambda >= TINY).all() and claim.gamma > 0):
        return False
    low = Enclosure(lower[:, None])
    width = Enclosure(upper[:, None]) - low
    try:
        v = solve(
            Enclosure(np.eye(n)) - Enclosure(W) * low.T,
            block([[Enclosure(W) * width.T, Enclosure(U)]]),
        )
    except ValueError:
        return False
    through, drive = (Enclosure(v.mid[:, s], v.radius[:, s]) for s in (slice(n), slice(n, None)))
    own = Enclosure(np.diag(width.mid[:, 0]), np.diag(width.radius[:, 0]))
    inequality = Inequality(
        W=through, U=drive, C=C @ (low * through + own), D=D + C @ (low * drive),
        Lambda=Enclosure(Lambda[:, None]),
    )  # fmt: skip
    return inequality.margin(claim.gamma) > 0


def fewer_inputs(rows: Array) -> Array:
    """Return a k × k lower triangle R such that every Ax with ‖x‖ ≤ 1 is Ry for some ‖y‖ ≤ 1.

    By Douglas' lemma that is AAᵀ ⪯ RRᵀ, which is proved. R is the Cholesky factor of AAᵀ, enlarged
    by the rounding, so a bound for inputs through R is one for inputs through A, and hardly more.

    Args:
        rows: A, k × p; U and D of a layer, one below the other.

    Raises:
        CertificateError: if no factor could be proved.
    """
    largest = np.max(np.abs(rows), axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise CertificateError("the inputs of a layer could not be reduced: U is not finite")
    if ((largest < 2.0**-900) & (largest > 0)).any() or is_denormal(rows).any():
        raise CertificateError(
            "the inputs of a layer could not be reduced: rows of U or D are below 2⁻⁹⁰⁰ or hold "
            "denormal numbers; set those to zero"
        )
    if not largest.any():
        return np.zeros((len(rows), len(rows)))
    # An exact scaling: rows of very different size are enlarged alike.
    scale = np.ldexp(1.0, -np.frexp(largest)[1])[:, None]
    exact = Enclosure(rows).scale(scale[:, 0], np.ones(rows.shape[1]))
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
    raise CertificateError("the inputs of a layer could not be reduced: U has no Cholesky factor")
