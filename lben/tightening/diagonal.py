"""Which bound does the best diagonal Λ support, of all outputs or of each pair of them?

Note [The least at hand]
A program ends a little above its optimum. What is proposed is the least of it, of what Λ as it is
shows, of what the weights claim, and, of a pair, of √2 times the bound of all outputs: M(Λ, γ) of
the pair is at least √2 times that of all at (√2γ, √2Λ), as CᵀC of a difference is at most 2CᵀC.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lben.certificates import CertificateError, Claim
from lben.certificates.proof import read_exactly
from lben.rigorous import power_of_two, up
from lben.tightening.interior_point import Program, minimise
from lben.tightening.scaled import (
    LEAST,
    Kept,
    has_no_feedthrough,
    least,
    promised_claim,
    promises_less,
)
from lben.weights import DenseWeights

_ROOM = 1 + 1e-7
"""For the proof: the optimum is strictly feasible by about its gap."""
_ROOT2 = up(math.sqrt(2.0))


def tighten_diagonal(weights: DenseWeights, *, gap: float = 1e-5) -> Claim:
    """Propose the least γ over every diagonal Λ: the LipSDP bound of what the weights assemble.

    A semidefinite program (Fazlyab et al. 2019 for feed-forward networks), solved from the weights'
    own Λ; see Note [The least at hand]. The result is a proposal: `certify` proves it.

    Args:
        weights: of a layer, or a network put together by `stack`; with or without a claim.
        gap: relative accuracy of γ².

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    exact = read_exactly(weights)
    claims = _optimal(exact, exact.C[None], _feedthrough(exact)[None], gap)
    if has_no_feedthrough(exact):
        claims.append(Kept.of(exact).claim(exact.C.numpy()))
    return least(weights, claims)


def tighten_pairs(
    weights: DenseWeights, *, fix_multiplier: bool = False, gap: float = 1e-4
) -> dict[tuple[int, int], Claim]:
    """Propose the least bound of yᵢ − yⱼ for every pair of outputs, i < j.

    Each is at most √2γ, what the bound of all of y says of a difference; see Note [The least at
    hand]. The results are proposals: `certify_pairs` proves them.

    Args:
        weights: of a layer, with or without a claim.
        fix_multiplier: keep the weights' own Λ up to a factor; otherwise one semidefinite program
            per pair, all in one batch.
        gap: relative accuracy of the squares.

    Raises:
        ValueError: if Λ is to be kept and the weights have a feed-through D.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    exact = read_exactly(weights)
    alone = has_no_feedthrough(exact)
    if fix_multiplier and not alone:
        raise ValueError("a multiplier is kept for weights without feed-through D")
    q = exact.out_features
    pairs = [(i, j) for i in range(q) for j in range(i + 1, q)]
    if not pairs:
        return {}
    index = torch.tensor(pairs, device="cpu")
    C, D = (t[index[:, 0]] - t[index[:, 1]] for t in (exact.C, _feedthrough(exact)))
    proposals: list[list[Claim]] = [[] for _ in pairs]
    if alone:
        kept = Kept.of(exact)
        whole = kept.claim(exact.C.numpy())
        for claims, row in zip(proposals, C.numpy(), strict=True):
            claims += [pair_claim(whole), kept.claim(row[None])]
    if not fix_multiplier:
        whole = tighten_diagonal(weights)
        optimal = _optimal(exact, C[:, None], D[:, None], gap)
        for claims, claim in zip(proposals, optimal, strict=True):
            claims += [pair_claim(whole), claim]
    best = [min(claims, key=lambda c: c.gamma or math.inf) for claims in proposals]
    if fix_multiplier and promises_less(weights, max(c.gamma or 0.0 for c in best) / _ROOT2):
        whole = pair_claim(promised_claim(weights))
        best = [min(c, whole, key=lambda c: c.gamma or math.inf) for c in best]
    return dict(zip(pairs, best, strict=True))


def pair_claim(claim: Claim) -> Claim:
    """Return what a claim of all outputs says of the difference of two."""
    if claim.gamma is None:
        return claim
    return Claim(up(_ROOT2 * claim.gamma), _ROOT2 * claim.Lambda.detach().cpu().double())


def _feedthrough(weights: DenseWeights) -> Tensor:
    if weights.D is not None:
        return weights.D
    return weights.C.new_zeros(weights.out_features, weights.in_features)


def _optimal(weights: DenseWeights, C: Tensor, D: Tensor, gap: float) -> list[Claim]:
    """Solve one program for each C and D of a batch, in units in which all are near 1.

    Outputs that are constant have the claim of `Kept`, and no program.
    """
    u, n = _size(weights.U), weights.hidden_features
    units = [max(_size(c) if bool(c.any()) else 0.0, (_size(d) if bool(d.any()) else 0.0) / u)
             for c, d in zip(C, D, strict=True)]  # fmt: skip
    driven = bool(weights.U.any())
    moved = [c > 0 and (driven or bool(d.any())) for c, d in zip(units, D, strict=True)]
    claims: list[Claim] = [Claim(None, weights.Lambda)] * len(C)
    if n == 0:
        for i, d in enumerate(D.numpy()):
            norm = float(np.linalg.norm(d, 2)) if d.any() else 0.0
            claims[i] = Claim(max(norm * _ROOM, LEAST), weights.Lambda)
        return claims
    constant = [i for i, m in enumerate(moved) if not m]
    if constant:
        kept = Kept.of(weights)
        for i in constant:
            claims[i] = kept.claim(C[i].numpy())
    index = torch.tensor([i for i, m in enumerate(moved) if m], dtype=torch.long, device="cpu")
    if not len(index):
        return claims
    c = torch.tensor([units[i] for i in index.tolist()], dtype=torch.float64, device="cpu")
    C, D = C[index] / c[:, None, None], D[index] / c[:, None, None] / u
    gammas, multipliers = _minimise(replace(weights, U=weights.U / u), C, D, gap)
    for i, unit, gamma, x in zip(index.tolist(), c.tolist(), gammas, multipliers, strict=True):
        # y/c is bounded by γ in units of u: by γuc in all, with Λ times c/u.
        claims[i] = Claim(max(gamma * unit * u, LEAST), x / gamma * (unit / u))
    return claims


def _minimise(
    weights: DenseWeights, C: Tensor, D: Tensor, gap: float
) -> tuple[list[float], Tensor]:
    """Return γ and γΛ of each program."""
    # One basis for the whole batch: the rows of U and of every D.
    rows = torch.cat([weights.U, D.flatten(0, 1)]) if bool(D.any()) else weights.U
    basis = torch.linalg.qr(rows.T)[0] if rows.shape[1] > rows.shape[0] else None
    U, D = (weights.U, D) if basis is None else (weights.U @ basis, D @ basis)

    def repeated(t: Tensor) -> Tensor:
        return t.expand(len(C), *t.shape)

    program = Program(W=repeated(weights.W), U=repeated(U), C=C, D=D)
    # The size of Λ is free: in units of its largest entry.
    multiplier = repeated(weights.Lambda / weights.Lambda.max())
    try:
        optimum = minimise(program, multiplier, gap=gap)
    except ValueError as error:
        raise CertificateError(str(error)) from error
    gammas = [math.sqrt(float(tau)) * _ROOM for tau in optimum.tau[:, 0]]
    return gammas, optimum.multiplier


def _size(t: Tensor) -> float:
    return power_of_two(float(t.abs().max())) if t.numel() else 1.0
