"""Which bound does the best diagonal Λ support, of all outputs or of each pair of them?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lben.certificates import CertificateError, Claim
from lben.tightening.kept import tighten
from lben.tightening.semidefinite import Optimum, Program, minimise
from lben.weights import ExplicitWeights

_ROOM = 1 + 1e-7
"""For the proof: the optimum is strictly feasible by about its gap."""


def tighten_jointly(weights: ExplicitWeights, *, gap: float = 1e-5) -> Claim:
    """Propose the least γ over every diagonal Λ: the LipSDP bound of what the weights assemble.

    A semidefinite program (Fazlyab et al. 2019 for feed-forward networks), solved from the weights'
    own Λ. The result is a proposal: `certify` proves it.

    Args:
        weights: of a layer, or a network put together by `stack`; with or without a claim.
        gap: relative accuracy of γ².

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    exact = weights.to(torch.float64)
    optimum = _minimise(exact, exact.C[None], _feedthrough(exact)[None], gap)
    claim = _claims(optimum)[0]
    if weights.gamma is not None and claim.gamma is not None and claim.gamma >= weights.gamma:
        return Claim(weights.gamma, weights.Lambda)
    return claim


def tighten_pairs(
    weights: ExplicitWeights, *, keep_multiplier: bool = False, gap: float = 1e-4
) -> dict[tuple[int, int], Claim]:
    """Propose the least bound of yᵢ − yⱼ for every pair of outputs, i < j.

    Each is at most √2γ, what the bound of all of y says of a difference. The results are proposals:
    `certify_pairs` proves them.

    Args:
        weights: of a layer, with or without a claim.
        keep_multiplier: keep the weights' own Λ up to a factor, by an eigenvalue problem per pair;
            otherwise one semidefinite program per pair, all in one batch.
        gap: relative accuracy of the squares.

    Raises:
        ValueError: if Λ is to be kept and the weights have a feed-through D.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    exact = weights.to(torch.float64)
    q = exact.out_features
    pairs = [(i, j) for i in range(q) for j in range(i + 1, q)]
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    C, D = (t[first] - t[second] for t in (exact.C, _feedthrough(exact)))
    if keep_multiplier:
        rows = (replace(exact, C=c[None], b_y=exact.b_y[:1], gamma=None) for c in C)
        return dict(zip(pairs, map(tighten, rows), strict=True))
    optimum = _minimise(exact, C[:, None], D[:, None], gap)
    return dict(zip(pairs, _claims(optimum), strict=True))


def _feedthrough(weights: ExplicitWeights) -> Tensor:
    if weights.D is not None:
        return weights.D
    return weights.C.new_zeros(weights.out_features, weights.in_features)


def _minimise(weights: ExplicitWeights, C: Tensor, D: Tensor, gap: float) -> Optimum:
    """Solve one program for each C and D of a batch."""
    # One basis for the whole batch: the rows of U and of every D.
    rows = torch.cat([weights.U, D.flatten(0, 1)]) if bool(D.any()) else weights.U
    basis = torch.linalg.qr(rows.T)[0] if rows.shape[1] > rows.shape[0] else None
    U, D = (weights.U, D) if basis is None else (weights.U @ basis, D @ basis)

    def repeated(t: Tensor) -> Tensor:
        return t.expand(len(C), *t.shape)

    program = Program(W=repeated(weights.W), U=repeated(U), C=C, D=D)
    try:
        return minimise(program, repeated(weights.Lambda), gap=gap)
    except ValueError as error:
        raise CertificateError(str(error)) from error


def _claims(optimum: Optimum) -> list[Claim]:
    gammas = [math.sqrt(float(tau)) * _ROOM for tau in optimum.tau[:, 0]]
    return [Claim(g, x / g) for g, x in zip(gammas, optimum.multiplier, strict=True)]
