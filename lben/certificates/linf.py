"""How far do differences of outputs move when no input moves by more than ε?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lben.certificates.certificate import CertificateError, PairCertificate
from lben.certificates.claims import LinfClaim
from lben.certificates.dense import METHOD
from lben.certificates.inequality import Inequality
from lben.certificates.pairs import difference
from lben.certificates.proof import check_multiplier, numbers_of, read_exactly, require
from lben.rigorous import TINY, Array, Enclosure, sum_up, up
from lben.weights import DenseWeights


def prove_linf(
    weights: DenseWeights, claims: Mapping[tuple[int, int], LinfClaim]
) -> PairCertificate:
    """Prove a bound of |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| for every pair of outputs, or raise; see `certify`.

    The proof is M(Λ, 1) ⪰ 0 for the input xₖ√τₖ in place of xₖ. If intervals prove a smaller bound
    of a pair, that bound is returned.

    Args:
        weights: float32 or float64.
        claims: τ and Λ for every pair of outputs i < j.

    Returns:
        The bounds of all pairs, per max |Δxₖ|.
    """
    exact, q, margins = read_exactly(weights), weights.out_features, []
    bounds = [list(row) for row in _bound_by_intervals(exact)]
    for i in range(q):
        for j in range(i + 1, q):
            if (i, j) not in claims:
                raise ValueError(f"nothing is claimed for the outputs {i} and {j}")
            claim = claims[i, j]
            tau = numbers_of("τ", claim.tau, weights.in_features)
            Lambda = torch.from_numpy(numbers_of("Λ", claim.Lambda, weights.hidden_features))
            check_multiplier(Lambda)
            if not (np.isfinite(tau).all() and (tau >= TINY).all()):
                raise CertificateError(
                    "τ must be positive and finite in every entry: normal numbers from "
                    f"{TINY:.3g}, it ranges from {tau.min():.3g} to {tau.max():.3g} for the "
                    f"outputs {i} and {j}"
                )
            block = _rescale_input(difference(exact, Lambda, i, j), tau)
            smallest = partial(block.smallest_eigenvalue, 1.0)
            margins.append(require(block.margin(1.0), smallest, 1.0))
            proved = up(math.sqrt(float(sum_up(tau))), 2)
            bounds[i][j] = bounds[j][i] = min(bounds[i][j], proved)
    return PairCertificate.of(weights, bounds, "linf", METHOD, min(margins, default=None))


def _rescale_input(block: Inequality, tau: Array) -> Inequality:
    unit = Enclosure(tau[None, :]).sqrt().reciprocal()
    D = block.D * unit if isinstance(block.D, Enclosure) else None
    return replace(block, U=block.U * unit, D=D)


def prove_by_intervals(weights: DenseWeights) -> PairCertificate:
    """Bound |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| by intervals: the cheap baseline.

    Slopes lie in [0, 1], so (1 − Wᵢᵢ)|Δzᵢ| ≤ Σ |Wᵢⱼ||Δzⱼ| + Σ |Uᵢₖ||Δxₖ|, the first sum over j ≠ i.
    Collect the terms of |Δz| on the left side into a matrix. If it is an M-matrix, then |Δz| ≤ εw
    for a vector w > 0 that is found here, where ε = max |Δxₖ|. A w > 0 with a positive image proves
    that it is one. Otherwise the bounds are infinite.

    Args:
        weights: float32 or float64.

    Returns:
        The bounds of all pairs, per max |Δxₖ|.
    """
    bounds = _bound_by_intervals(read_exactly(weights))
    method = "intervals, with rounding enclosed"
    return PairCertificate.of(weights, bounds, "linf", method, None)


def _bound_by_intervals(exact: DenseWeights) -> list[list[float]]:
    """Return the bounds of `prove_by_intervals` for float64 weights."""
    W, U, C = (t.numpy() for t in (exact.W, exact.U, exact.C))
    q = len(C)
    bounds = np.full((q, q), math.inf)
    np.fill_diagonal(bounds, 1.0)
    sizes = np.asarray(sum_up(np.abs(U), axis=1))
    with np.errstate(all="ignore"):
        w = _find_positive_vector(W, sizes)
        if w is not None:
            for i in range(q):
                for j in range(i + 1, q):
                    bounds[i, j] = bounds[j, i] = _bound_change(exact, w, i, j)
    return [[float(b) for b in row] for row in bounds]


def _find_positive_vector(W: Array, sizes: Array) -> Array | None:
    """Return w ≥ |Δz| for every |Δx| ≤ 1, or None where none can be proved."""
    n = len(W)
    comparison = -np.abs(W)
    np.fill_diagonal(comparison, 1 - np.diag(W))
    try:
        w = np.abs(np.linalg.solve(comparison, sizes + 1e-300)) * (1 + 1e-9) + 2 * TINY
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(w).all():
        return None
    column = Enclosure(w[:, None])
    off_diagonal = Enclosure(-np.abs(W) * (1 - np.eye(n)))
    own = (Enclosure(np.ones((n, 1))) - Enclosure(np.diag(W)[:, None])) * column
    image = own + off_diagonal @ column
    held = (image.mid - image.radius)[:, 0] * (1 - 2.0**-50) > sizes
    return w if held.all() else None


def _bound_change(exact: DenseWeights, w: Array, i: int, j: int) -> float:
    """Bound |Δyᵢ − Δyⱼ| where |Δz| ≤ w and |Δx| ≤ 1."""

    def size(rows: Array) -> Array:
        return (Enclosure(rows[i : i + 1]) - Enclosure(rows[j : j + 1])).magnitude[0]

    change = float(sum_up(size(exact.C.numpy()) * w * (1 + 2.0**-50)))
    if exact.D is not None:
        change = up(change + float(sum_up(size(exact.D.numpy()))))
    return change if math.isfinite(change) else math.inf
