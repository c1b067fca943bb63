"""Which Lipschitz bound do given weights have? Proofs about weights, and nothing else.

A proof reads the weights alone, and never the parameterization that made them. So a fault in a
parameterization can loosen a bound or make its proof fail. It cannot make a bound wrong.

Symbols: docs/glossary.md.
"""

from lben.certificates.certificate import (
    Certificate,
    CertificateError,
    ChainCertificate,
    LayerCertificate,
    LipschitzCertificate,
    LocalCertificate,
    PairCertificate,
    Sensitivity,
    compose,
)
from lben.certificates.certify import Certifiable, certify
from lben.certificates.claims import Claim, IntervalClaim, LinfClaim
from lben.certificates.network_norms import product_bound
from lben.certificates.sensitivity import sensitivity

__all__ = [
    "Certifiable",
    "Certificate",
    "CertificateError",
    "ChainCertificate",
    "Claim",
    "IntervalClaim",
    "LayerCertificate",
    "LinfClaim",
    "LipschitzCertificate",
    "LocalCertificate",
    "PairCertificate",
    "Sensitivity",
    "certify",
    "compose",
    "product_bound",
    "sensitivity",
]
