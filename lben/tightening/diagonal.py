"""Which bound does the best diagonal Λ support, of all outputs or of each pair of them?

Note [The least at hand]
The interior-point method stops a little above the optimum. So the proposal is the least of several
bounds: the one it found, the one that the weights' own Λ shows, and the one that the weights claim.
For a pair of outputs √2 times the bound of all outputs is a further one: with c = (eᵢ − eⱼ)ᵀC,
cᵀc ⪯ 2CᵀC, so M(√2Λ, √2γ) of the pair is ⪰ √2 M(Λ, γ) of all outputs.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lben.certificates import CertificateError, Claim
from lben.certificates.proof import read_exactly
from lben.rigorous import power_of_two, up
from lben.tightening.layer_program import LayerOptimum, LayerProgram, minimise_bound
from lben.tightening.scaled import (
    SMALLEST_BOUND,
    ScaledMultiplier,
    choose_least_claim,
    get_own_claim,
    lacks_feedthrough,
    proves_own_claim,
)
from lben.weights import DenseWeights

_PROOF_SLACK = 1 + 1e-7
"""Factor of a proposed γ, so that floating point can prove it."""
_ROOT2 = up(math.sqrt(2.0))


def tighten_diagonal(weights: DenseWeights, *, gap: float = 1e-5) -> Claim:
    """Propose the least γ over every diagonal Λ: the LipSDP bound of what the weights assemble.

    The semidefinite program min γ so that M(Λ, γ) ⪰ 0, solved from the weights' own Λ; see Note
    [The least at hand]. The result is a proposal: `certify` proves it.

    Args:
        weights: of a layer, or of a network assembled by `stack`; with or without a claim.
        gap: relative accuracy of γ².

    Returns:
        γ, an l2 Lipschitz constant of x ↦ y, and the Λ that shows it.

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Reference:
        Fazlyab, Robey, Hassani, Morari and Pappas (2019), "Efficient and accurate estimation of
        Lipschitz constants for deep neural networks", Theorem 2, for feed-forward networks.

    Example:
        Two layers, 2x and then 0.5x, have the bound 1 together; so has their assembly.

        >>> import torch
        >>> from lben import DenseWeights, certify
        >>> from lben.tightening import tighten_diagonal
        >>> W = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
        >>> U, C = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 1.0]])
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> network = DenseWeights(
        ...     W=W, U=U, b=zero, C=C, D=None, b_y=zero[:1], Lambda=one, gamma=None
        ... )
        >>> claim = tighten_diagonal(network)
        >>> round(claim.gamma, 3)
        1.0
        >>> certify(network, claim).bound == claim.gamma
        True
    """
    exact = read_exactly(weights)
    claims = _solve_programs(exact, exact.C[None], _feedthrough(exact)[None], gap)
    if lacks_feedthrough(exact):
        claims.append(ScaledMultiplier.of(exact).propose(exact.C.numpy()))
    return choose_least_claim(weights, claims)


def tighten_pairs(
    weights: DenseWeights, *, fix_multiplier: bool = False, gap: float = 1e-4
) -> dict[tuple[int, int], Claim]:
    """Propose the least bound of yᵢ − yⱼ for every pair of outputs, i < j.

    None is above √2γ, which a bound γ of all of y implies for a difference; see Note [The least at
    hand]. The results are proposals: `certify_pairs` proves them.

    Args:
        weights: of a layer, with or without a claim.
        fix_multiplier: take the weights' own Λ times a factor; otherwise solve a semidefinite
            program per pair, all in one batch.
        gap: relative accuracy of γ².

    Returns:
        For every (i, j) a claim: γ with |Δyᵢ − Δyⱼ| ≤ γ‖Δx‖₂, and its Λ.

    Raises:
        ValueError: if fix_multiplier is given for weights with a feed-through D.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Example:
        >>> import torch
        >>> from lben import DenseWeights
        >>> from lben.tightening import tighten_pairs
        >>> eye, zero = torch.eye(2), torch.zeros(2)
        >>> weights = DenseWeights(
        ...     W=0 * eye, U=eye, b=zero, C=eye, D=None, b_y=zero, Lambda=zero + 1, gamma=1.1
        ... )
        >>> {pair: round(claim.gamma, 3) for pair, claim in tighten_pairs(weights).items()}
        {(0, 1): 1.414}
    """
    exact = read_exactly(weights)
    alone = lacks_feedthrough(exact)
    if fix_multiplier and not alone:
        raise ValueError(
            "fix_multiplier needs weights without feed-through D, and these have one: leave it out"
        )
    q = exact.out_features
    pairs = [(i, j) for i in range(q) for j in range(i + 1, q)]
    if not pairs:
        return {}
    index = torch.tensor(pairs, device="cpu")
    C, D = (t[index[:, 0]] - t[index[:, 1]] for t in (exact.C, _feedthrough(exact)))
    proposals: list[list[Claim]] = [[] for _ in pairs]
    if alone:
        scaled = ScaledMultiplier.of(exact)
        whole = scaled.propose(exact.C.numpy())
        for claims, row in zip(proposals, C.numpy(), strict=True):
            claims += [derive_pair_claim(whole), scaled.propose(row[None])]
    if not fix_multiplier:
        whole = tighten_diagonal(weights)
        optimal = _solve_programs(exact, C[:, None], D[:, None], gap)
        for claims, claim in zip(proposals, optimal, strict=True):
            claims += [derive_pair_claim(whole), claim]
    best = [min(claims, key=lambda c: c.gamma or math.inf) for claims in proposals]
    if fix_multiplier and proves_own_claim(weights, max(c.gamma or 0.0 for c in best) / _ROOT2):
        whole = derive_pair_claim(get_own_claim(weights))
        best = [min(c, whole, key=lambda c: c.gamma or math.inf) for c in best]
    return dict(zip(pairs, best, strict=True))


def derive_pair_claim(claim: Claim) -> Claim:
    """Return √2γ and √2Λ: a claim (Λ, γ) of all outputs implies it of the difference of two."""
    if claim.gamma is None:
        return claim
    return Claim(up(_ROOT2 * claim.gamma), _ROOT2 * claim.Lambda.detach().cpu().double())


def _feedthrough(weights: DenseWeights) -> Tensor:
    if weights.D is not None:
        return weights.D
    return weights.C.new_zeros(weights.out_features, weights.in_features)


def _solve_programs(weights: DenseWeights, C: Tensor, D: Tensor, gap: float) -> list[Claim]:
    """Solve one program for each C and D of a batch, in units in which their entries are near 1.

    Constant outputs need no program; `ScaledMultiplier` has their claim.
    """
    u, n = _choose_unit(weights.U), weights.hidden_features
    units = [
        max(*(_choose_unit(t) / of if bool(t.any()) else 0.0 for t, of in ((c, 1.0), (d, u))))
        for c, d in zip(C, D, strict=True)
    ]
    driven = bool(weights.U.any())
    moved = [c > 0 and (driven or bool(d.any())) for c, d in zip(units, D, strict=True)]
    claims: list[Claim] = [Claim(None, weights.Lambda)] * len(C)
    if n == 0:
        for i, d in enumerate(D.numpy()):
            norm = float(np.linalg.norm(d, 2)) if d.any() else 0.0
            claims[i] = Claim(max(norm * _PROOF_SLACK, SMALLEST_BOUND), weights.Lambda)
        return claims
    constant = [i for i, m in enumerate(moved) if not m]
    if constant:
        scaled = ScaledMultiplier.of(weights)
        for i in constant:
            claims[i] = scaled.propose(C[i].numpy())
    index = torch.tensor([i for i, m in enumerate(moved) if m], dtype=torch.long, device="cpu")
    if not len(index):
        return claims
    c = torch.tensor([units[i] for i in index.tolist()], dtype=torch.float64, device="cpu")
    C, D = C[index] / c[:, None, None], D[index] / c[:, None, None] / u
    optimum = _minimise(replace(weights, U=weights.U / u), C, D, gap)
    if not bool(optimum.converged.all()):
        warnings.warn(
            f"the semidefinite program ended after {optimum.steps} steps with a relative gap of "
            f"{float(optimum.gap.max()):.1g} in γ², where {gap:.1g} was asked for: the bound is "
            "valid once it is proved, and may not be the least",
            stacklevel=3,
        )
    for j, (i, unit) in enumerate(zip(index.tolist(), c.tolist(), strict=True)):
        # y/c is bounded by γ in units of u: by γuc in all, with Λ times c/u.
        gamma = math.sqrt(float(optimum.tau[j, 0])) * _PROOF_SLACK
        claims[i] = Claim(
            max(gamma * unit * u, SMALLEST_BOUND), optimum.multiplier[j] / gamma * (unit / u),
            gap=0.5 * float(optimum.gap[j]) + _PROOF_SLACK - 1,
        )  # fmt: skip
    return claims


def _minimise(weights: DenseWeights, C: Tensor, D: Tensor, gap: float) -> LayerOptimum:
    """Return γ² and γΛ of each program."""
    # One basis for the whole batch: the rows of U and of every D.
    rows = torch.cat([weights.U, D.flatten(0, 1)]) if bool(D.any()) else weights.U
    basis = torch.linalg.qr(rows.T)[0] if rows.shape[1] > rows.shape[0] else None
    U, D = (weights.U, D) if basis is None else (weights.U @ basis, D @ basis)

    def repeat(t: Tensor) -> Tensor:
        return t.expand(len(C), *t.shape)

    program = LayerProgram(W=repeat(weights.W), U=repeat(U), C=C, D=D)
    # The size of Λ is free: in units of its largest entry.
    multiplier = repeat(weights.Lambda / weights.Lambda.max())
    try:
        return minimise_bound(program, multiplier, gap=gap)
    except ValueError as error:
        raise CertificateError(str(error)) from error


def _choose_unit(t: Tensor) -> float:
    return power_of_two(float(t.abs().max())) if t.numel() else 1.0
