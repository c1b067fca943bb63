"""Which Lipschitz bound do the weights of a dense layer have?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from lben.certificates.certificate import LayerCertificate
from lben.certificates.claims import Claim
from lben.certificates.inequality import Inequality
from lben.certificates.proof import multiplier_of, prove, read_exactly
from lben.weights import DenseWeights, check_gamma

METHOD = "Cholesky of a shifted Schur complement, verified a posteriori in float64"
"""How every bound of a dense layer is proved."""


def prove_dense(weights: DenseWeights, claim: Claim | None = None) -> LayerCertificate:
    """Prove M(Λ, γ) ⪰ 0 for matrices exactly as stored, or raise; see `certify`.

    Args:
        weights: float32 or float64.
        claim: γ and Λ; those of the weights when None.

    Returns:
        The certificate, with m, L and the output gain for the Λ of the weights.
    """
    claim = Claim(weights.gamma, weights.Lambda) if claim is None else claim
    gamma, exact = check_gamma(claim.gamma), read_exactly(weights)
    claimed = Inequality.of(exact, multiplier_of(weights, claim).numpy())
    return prove(weights, gamma, [claimed], [Inequality.of(exact, exact.Lambda.numpy())], METHOD)
