"""Which bound do the weights of a dense layer have?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lben.certificates.certificate import Certificate, Claim, PairCertificate
from lben.certificates.inequality import Inequality
from lben.certificates.proof import check_multiplier, numbers_of, prove, read_exactly, require
from lben.rigorous import Enclosure
from lben.weights import DenseWeights, check_gamma

METHOD = "Cholesky of a shifted Schur complement, verified a posteriori in float64"
"""How every bound of a dense layer is proved."""


def certify(weights: DenseWeights, claim: Claim | None = None) -> Certificate:
    """Prove M(Λ, γ) ⪰ 0 for the weights exactly as stored, or raise.

    With γ None, prove that the equilibrium exists and is unique (2Λ − ΛW − WᵀΛ ≻ 0) and return an
    infinite bound. m, L and the output gain are always those of the weights' own Λ, the metric in
    which the layer is solved. The claim is the weights' own γ and Λ when omitted. Revay, Wang and
    Manchester (2020), Theorems 1 and 2; D as in recurrent equilibrium networks (Revay, Wang and
    Manchester 2023).

    Raises:
        ValueError: if the claimed γ is not positive and finite, its Λ has another size, or the
            weights are neither float32 nor float64.
        CertificateError: if the proof fails, with the smallest eigenvalue found.
    """
    claim = Claim(weights.gamma, weights.Lambda) if claim is None else claim
    gamma, tensors = check_gamma(claim.gamma), read_exactly(weights)
    multiplier = _multiplier(weights, claim)
    return prove(
        weights,
        gamma,
        [Inequality.of(tensors, multiplier.numpy())],
        [Inequality.of(tensors, tensors.Lambda.numpy())],
        METHOD,
    )


def certify_pairs(
    weights: DenseWeights, claims: Mapping[tuple[int, int], Claim]
) -> PairCertificate:
    """Prove a bound of yᵢ − yⱼ for every pair of outputs, or raise.

    M(Λ, γ) for the output (eᵢ − eⱼ)ᵀy, the rounding of the difference of the rows of C and D
    enclosed.

    Args:
        weights: exactly as they run.
        claims: a bound and the multiplier that shows it, for every pair i < j.

    Returns:
        The bounds, q × q, with 1 on the diagonal: what `certified_radius` and `compose` take.

    Raises:
        ValueError: if a pair has no claim, a claim no positive finite γ or a Λ of another size, or
            the weights are neither float32 nor float64.
        CertificateError: if a proof fails, with the smallest eigenvalue found.
    """
    q = weights.out_features
    exact = read_exactly(weights)
    bounds = [[1.0] * q for _ in range(q)]
    for i in range(q):
        for j in range(i + 1, q):
            claim = claims.get((i, j))
            gamma = None if claim is None else check_gamma(claim.gamma)
            if claim is None or gamma is None:
                raise ValueError(f"no bound is claimed for the outputs {i} and {j}")
            block = difference(exact, _multiplier(weights, claim), i, j)
            require(block.margin(gamma), partial(block.smallest_eigenvalue, gamma), gamma)
            bounds[i][j] = bounds[j][i] = gamma
    return pair_certificate(weights, bounds, "l2", METHOD)


def pair_certificate(
    weights: DenseWeights, bounds: Sequence[Sequence[float]], norm: str, method: str
) -> PairCertificate:
    """Return what was proved of every pair of outputs, tied to the weights."""
    return PairCertificate(
        bounds=tuple(tuple(map(float, row)) for row in bounds), norm=norm,
        fingerprint=weights.fingerprint, dtype=str(weights.W.dtype).removeprefix("torch."),
        method=method,
    )  # fmt: skip


def _multiplier(weights: DenseWeights, claim: Claim) -> Tensor:
    """Return the Λ of a claim, in float64."""
    multiplier = torch.from_numpy(numbers_of("Lambda", claim.Lambda, weights.hidden_features))
    check_multiplier(multiplier)
    return multiplier


def difference(weights: DenseWeights, multiplier: Tensor, i: int, j: int) -> Inequality:
    """Return the inequality of yᵢ − yⱼ, for float64 weights."""

    def rows(t: Tensor) -> Enclosure:
        return Enclosure(t[i : i + 1].numpy()) - Enclosure(t[j : j + 1].numpy())

    return replace(
        Inequality.of(weights, multiplier.numpy()),
        C=rows(weights.C),
        D=None if weights.D is None else rows(weights.D),
    )
