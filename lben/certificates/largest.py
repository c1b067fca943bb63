"""How far do outputs move when no input moves by more than ε?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from lben.certificates.dense import difference
from lben.certificates.proof import check_entries, require
from lben.inequality import Inequality
from lben.rigorous import Array, Enclosure, sum_up, up
from lben.weights import ExplicitWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class LargestClaim:
    """That an output changes by at most √(Σ τₖ Δxₖ²), and so by at most √Στ · max |Δxₖ|.

    Attributes:
        tau: τ, one positive number per input.
        Lambda: the multiplier that is said to show it, n positive numbers.
    """

    tau: Array
    Lambda: Array


def certify_largest(
    weights: ExplicitWeights, claims: Mapping[tuple[int, int], LargestClaim]
) -> tuple[tuple[float, ...], ...]:
    """Prove a bound of |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| for every pair of outputs, or raise.

    It is M(Λ, 1) for inputs in units of τ^(−½).

    Args:
        weights: exactly as they run.
        claims: for every pair i < j.

    Returns:
        √Στ of every pair, q × q, with 1 on the diagonal.

    Raises:
        ValueError: if a pair has no claim.
        CertificateError: if a proof fails.
    """
    exact, q = weights.to(torch.float64), weights.out_features
    shapes = (weights.in_features,), (weights.hidden_features,)
    bounds = [[1.0] * q for _ in range(q)]
    for i in range(q):
        for j in range(i + 1, q):
            if (i, j) not in claims:
                raise ValueError(f"nothing is claimed for the outputs {i} and {j}")
            claim = claims[i, j]
            if (claim.tau.shape, claim.Lambda.shape) != shapes:
                raise ValueError(
                    f"a claim needs τ and Λ of shapes {shapes[0]} and {shapes[1]}, "
                    f"got {claim.tau.shape} and {claim.Lambda.shape}"
                )
            check_entries(exact, torch.from_numpy(claim.Lambda))
            block = _in_units(difference(exact, torch.from_numpy(claim.Lambda), i, j), claim.tau)
            require(block.margin(1.0), partial(block.smallest_eigenvalue, 1.0), 1.0)
            bounds[i][j] = bounds[j][i] = up(math.sqrt(float(sum_up(claim.tau))), 2)
    return tuple(map(tuple, bounds))


def _in_units(block: Inequality, tau: Array) -> Inequality:
    unit = Enclosure(tau[None, :]).sqrt().reciprocal()
    D = block.D * unit if isinstance(block.D, Enclosure) else None
    return replace(block, U=block.U * unit, D=D)


def interval_bounds(weights: ExplicitWeights) -> tuple[tuple[float, ...], ...]:
    """Bound |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| by intervals: the cheap baseline.

    With slopes in [0, 1], (1 − Wᵢᵢ)|Δzᵢ| ≤ Σ |Wᵢⱼ||Δzⱼ| + Σ |Uᵢₖ||Δxₖ|. Where the matrix of the
    left side less the right is an M-matrix, which a w > 0 with a positive image proves, |Δz| ≤ εw.

    Returns:
        q × q, with 1 on the diagonal; infinite where it is no M-matrix.
    """
    exact = weights.to(torch.float64)
    W, U, C = (t.numpy() for t in (exact.W, exact.U, exact.C))
    q, n = C.shape
    bounds = np.full((q, q), math.inf)
    np.fill_diagonal(bounds, 1.0)
    sizes = np.asarray(sum_up(np.abs(U), axis=1))
    comparison = -np.abs(W)
    np.fill_diagonal(comparison, 1 - np.diag(W))
    with np.errstate(all="ignore"):
        w = np.abs(np.linalg.solve(comparison, sizes + 1e-300)) * (1 + 1e-9)
    inside = Enclosure(-np.abs(W) + np.diag(np.abs(np.diag(W)))) @ Enclosure(w[:, None])
    diagonal = (Enclosure(np.ones((n, 1))) - Enclosure(np.diag(W)[:, None])) * Enclosure(w[:, None])
    image = diagonal + inside
    if not (np.isfinite(w).all() and (w > 0).all()):
        return tuple(map(tuple, bounds.tolist()))
    if not ((image.mid - image.radius)[:, 0] * (1 - 2.0**-50) > sizes).all():
        return tuple(map(tuple, bounds.tolist()))
    for i in range(q):
        for j in range(i + 1, q):
            row = (Enclosure(C[i : i + 1]) - Enclosure(C[j : j + 1])).magnitude[0]
            change = float(sum_up(row * w * (1 + 2.0**-50)))
            if exact.D is not None:
                D = exact.D.numpy()
                direct = (Enclosure(D[i : i + 1]) - Enclosure(D[j : j + 1])).magnitude[0]
                change = up(change + float(sum_up(direct)))
            bounds[i, j] = bounds[j, i] = change
    return tuple(map(tuple, bounds.tolist()))
