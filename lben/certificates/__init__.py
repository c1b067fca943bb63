"""Proofs about weights, and nothing else.

A certificate sees weights alone, never how they came about. So a fault in a parameterization can
cost tightness or make the proof fail, and never make a bound wrong.
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
    "sensitivity",
]
