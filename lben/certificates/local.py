"""What can be proved near one input, where the slopes of σ are known to lie in [low, high]?

The inequality M(Λ, γ) ≻ 0, for an unknown z̃ whose slopes lie in [0, 1] again. Symbols:
docs/glossary.md.
"""

from __future__ import annotations

import math
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
    """The claim ‖Δy‖₂ ≤ γ‖Δx‖₂ for all increments with chord slopes Δzᵢ/Δvᵢ in [lowᵢ, highᵢ].

    Attributes:
        gamma: γ.
        Lambda: the multiplier of z̃ that shows it, n positive numbers.
        low, high: slope bounds, n numbers each in [0, 1].
    """

    gamma: float
    Lambda: Array
    low: Array
    high: Array


def prove_local_claim(W: Array, U: Array, C: Enclosure, D: Enclosure, claim: LocalClaim) -> float:
    """Return the margin of a local claim for z = σ(Wz + Ux + b), y = Cz + Dx + b_y.

    For increments, v = Wz + Ux. Define z̃ by z = low·v + (high − low)·z̃: as a function of v it has
    slopes in [0, 1], and (I − W low) v = W (high − low) z̃ + Ux. So the claim is M(Λ, γ) ≻ 0 for the
    weights of z̃,

        W̃ = (I − W low)⁻¹ W (high − low),   Ũ = (I − W low)⁻¹ U,
        C̃ = C (low W̃ + high − low),          D̃ = D + C low Ũ,

    each enclosed with its rounding.

    Args:
        W: n × n, exact.
        U: n × k, exact.
        C: q × n, enclosed.
        D: q × k, enclosed.
        claim: γ, Λ and slope bounds.

    Returns:
        A proved lower bound of the smallest eigenvalue that has to be positive: the claim is proved
        where it is above 0. −inf if the numbers are no valid claim.

    Example:
        A unit with slopes in [0, ½] changes by at most ½|Δx|, but not by at most 0.4|Δx|.

        >>> import numpy as np
        >>> from lben.certificates.local import LocalClaim, prove_local_claim
        >>> from lben.rigorous import Enclosure
        >>> one = np.ones((1, 1))
        >>> def claim(gamma):
        ...     return LocalClaim(gamma=gamma, Lambda=one[0] / 2, low=0 * one[0], high=0.5 * one[0])
        >>> C, D = Enclosure(one), Enclosure(0 * one)
        >>> [prove_local_claim(0 * one, one, C, D, claim(gamma)) > 0 for gamma in (0.51, 0.4)]
        [True, False]
    """
    n = len(W)
    Lambda, lower, upper = (
        numbers_of(name, values, n)
        for name, values in (("Λ", claim.Lambda), ("low", claim.low), ("high", claim.high))
    )
    in_order = bool(((lower >= 0) & (lower <= upper) & (upper <= 1)).all())
    if not (in_order and np.isfinite(Lambda).all() and (Lambda >= TINY).all() and claim.gamma > 0):
        return -math.inf
    low = Enclosure(lower[:, None])
    width = Enclosure(upper[:, None]) - low
    try:
        v = solve(
            Enclosure(np.eye(n)) - Enclosure(W) * low.T,
            block([[Enclosure(W) * width.T, Enclosure(U)]]),
        )
    except ValueError:
        return -math.inf
    through, drive = (Enclosure(v.mid[:, s], v.radius[:, s]) for s in (slice(n), slice(n, None)))
    own = Enclosure(np.diag(width.mid[:, 0]), np.diag(width.radius[:, 0]))
    inequality = Inequality(
        W=through, U=drive, C=C @ (low * through + own), D=D + C @ (low * drive),
        Lambda=Enclosure(Lambda[:, None]),
    )  # fmt: skip
    return inequality.margin(claim.gamma)


def compress_inputs(rows: Array) -> Array:
    """Return a k × k matrix R such that inputs through R reach all that inputs through A reach.

    Every Ax with ‖x‖₂ ≤ 1 is Ry for some ‖y‖₂ ≤ 1 if and only if AAᵀ ⪯ RRᵀ (Douglas' lemma), which
    is proved here. So a bound for inputs through R holds for inputs through A. R is a Cholesky
    factor of AAᵀ, enlarged by its rounding only.

    Args:
        rows: A, k × p: U of a layer, above D.

    Returns:
        R, lower triangular.

    Raises:
        CertificateError: if no factor could be proved.

    Reference:
        Douglas (1966), "On majorization, factorization, and range inclusion of operators on
        Hilbert space", Theorem 1.

    Example:
        >>> import numpy as np
        >>> from lben.certificates.local import compress_inputs
        >>> R = compress_inputs(np.array([[3.0, 4.0, 0.0]]))
        >>> R.shape, round(float(R[0, 0]), 6)
        ((1, 1), 5.0)
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
