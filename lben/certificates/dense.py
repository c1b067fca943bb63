"""Which bound do the weights of a dense layer have?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lben.certificates.proof import check_entries, prove, require
from lben.certificates.records import Certificate, Claim
from lben.inequality import Inequality
from lben.rigorous import Enclosure
from lben.weights import ExplicitWeights, check_gamma


def certify(weights: ExplicitWeights, claim: Claim | None = None) -> Certificate:
    """Prove M(Λ, γ) ⪰ 0 for the weights exactly as stored, or raise.

    With γ None, prove that the equilibrium exists and is unique (2Λ − ΛW − WᵀΛ ≻ 0) and return an
    infinite bound. m, L and the output gain are always those of the weights' own Λ, the metric in
    which the layer is solved. The claim is the weights' own γ and Λ when omitted. Revay, Wang and
    Manchester (2020), Theorems 1 and 2; D as in recurrent equilibrium networks (Revay, Wang and
    Manchester 2023).

    Raises:
        ValueError: if the claimed γ is not positive and finite, or its Λ has another size.
        CertificateError: if the proof fails, with the smallest eigenvalue found.
    """
    claim = Claim(weights.gamma, weights.Lambda) if claim is None else claim
    multiplier = _multiplier(weights, claim)
    tensors = weights.to(torch.float64)
    check_entries(tensors, multiplier)
    return prove(
        weights,
        claim.gamma,
        [Inequality.of(tensors, multiplier.numpy())],
        [Inequality.of(tensors, tensors.Lambda.numpy())],
        "Cholesky of a shifted Schur complement, verified a posteriori in float64",
    )


def certify_pairs(
    weights: ExplicitWeights, claims: Mapping[tuple[int, int], Claim]
) -> tuple[tuple[float, ...], ...]:
    """Prove a bound of yᵢ − yⱼ for every pair of outputs, or raise.

    M(Λ, γ) for the output (eᵢ − eⱼ)ᵀy, the rounding of the difference of the rows of C and D
    enclosed.

    Args:
        weights: exactly as they run.
        claims: a bound and the multiplier that shows it, for every pair i < j.

    Returns:
        The bounds, q × q, with 1 on the diagonal: what `certified_radius` takes.

    Raises:
        ValueError: if a pair has no claim, or a claim no positive finite γ or a Λ of another size.
        CertificateError: if a proof fails, with the smallest eigenvalue found.
    """
    q = weights.out_features
    exact = weights.to(torch.float64)
    bounds = [[1.0] * q for _ in range(q)]
    for i in range(q):
        for j in range(i + 1, q):
            claim = claims.get((i, j))
            if claim is None or claim.gamma is None:
                raise ValueError(f"no bound is claimed for the outputs {i} and {j}")
            multiplier = _multiplier(weights, claim)
            check_entries(exact, multiplier)
            block = difference(exact, multiplier, i, j)
            compute = partial(block.smallest_eigenvalue, claim.gamma)
            require(block.margin(claim.gamma), compute, claim.gamma)
            bounds[i][j] = bounds[j][i] = claim.gamma
    return tuple(map(tuple, bounds))


def _multiplier(weights: ExplicitWeights, claim: Claim) -> Tensor:
    """Return the Λ of a claim, in float64."""
    check_gamma(claim.gamma)
    if claim.Lambda.shape != weights.Lambda.shape:
        raise ValueError(
            f"the claim's Lambda must have shape {tuple(weights.Lambda.shape)}, "
            f"got {tuple(claim.Lambda.shape)}"
        )
    return claim.Lambda.detach().to("cpu", torch.float64)


def difference(weights: ExplicitWeights, multiplier: Tensor, i: int, j: int) -> Inequality:
    """Return the inequality of yᵢ − yⱼ, for float64 weights."""

    def rows(t: Tensor) -> Enclosure:
        return Enclosure(t[i : i + 1].numpy()) - Enclosure(t[j : j + 1].numpy())

    return replace(
        Inequality.of(weights, multiplier.numpy()),
        C=rows(weights.C),
        D=None if weights.D is None else rows(weights.D),
    )
