"""Which Lipschitz bound does every difference of two outputs have?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from lben.certificates.certificate import PairCertificate
from lben.certificates.claims import Claim
from lben.certificates.dense import METHOD
from lben.certificates.inequality import Inequality
from lben.certificates.proof import multiplier_of, read_exactly, require
from lben.rigorous import Enclosure
from lben.weights import DenseWeights, check_gamma


def prove_pairs(weights: DenseWeights, claims: Mapping[tuple[int, int], Claim]) -> PairCertificate:
    """Prove a bound of yᵢ − yⱼ for every pair of outputs, or raise; see `certify`.

    For each pair the proof is M(Λ, γ) ⪰ 0 for the single output (eᵢ − eⱼ)ᵀy. The rounding in the
    differences of rows of C and of D is enclosed.

    Args:
        weights: float32 or float64.
        claims: γ and Λ for every pair of outputs i < j.

    Returns:
        The l2 bounds of all pairs.
    """
    q = weights.out_features
    exact, margins = read_exactly(weights), []
    bounds = [[1.0] * q for _ in range(q)]
    for i in range(q):
        for j in range(i + 1, q):
            claim = claims.get((i, j))
            gamma = None if claim is None else check_gamma(claim.gamma)
            if claim is None or gamma is None:
                raise ValueError(f"no bound is claimed for the outputs {i} and {j}")
            block = difference(exact, multiplier_of(weights, claim), i, j)
            smallest = partial(block.smallest_eigenvalue, gamma)
            margins.append(require(block.margin(gamma), smallest, gamma))
            bounds[i][j] = bounds[j][i] = gamma
    return PairCertificate.of(weights, bounds, "l2", METHOD, min(margins, default=None))


def difference(weights: DenseWeights, multiplier: Tensor, i: int, j: int) -> Inequality:
    """Return the inequality of yᵢ − yⱼ, for float64 weights.

    Args:
        weights: float64.
        multiplier: Λ, n numbers.
        i, j: indices of the outputs.
    """

    def rows(t: Tensor) -> Enclosure:
        return Enclosure(t[i : i + 1].numpy()) - Enclosure(t[j : j + 1].numpy())

    return replace(
        Inequality.of(weights, multiplier.numpy()),
        C=rows(weights.C),
        D=None if weights.D is None else rows(weights.D),
    )
