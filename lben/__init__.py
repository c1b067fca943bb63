"""Equilibrium networks with a Lipschitz bound that holds by construction."""

import lben._companion  # noqa: F401  first: the other modules need the right solvers
from lben.certificates import (
    Certificate,
    CertificateError,
    Claim,
    NetworkCertificate,
    certified_radius,
    certify,
    compose,
    tighten,
)
from lben.layers import EquilibriumLinear, Normalize
from lben.models import EquilibriumClassifier, EquilibriumClassifierConfig
from lben.weights import ExplicitWeights

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "CertificateError",
    "Claim",
    "EquilibriumClassifier",
    "EquilibriumClassifierConfig",
    "EquilibriumLinear",
    "ExplicitWeights",
    "NetworkCertificate",
    "Normalize",
    "certified_radius",
    "certify",
    "compose",
    "tighten",
]
