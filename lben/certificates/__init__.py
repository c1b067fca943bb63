"""Proofs about explicit weights, and nothing else.

A certificate sees explicit weights alone, never how they came about, so a bug in a
parameterization can cost tightness or make the proof fail, never make a bound wrong.
"""

from lben.certificates.certificate import (
    AnyWeights,
    Certificate,
    CertificateError,
    Claim,
    NetworkCertificate,
    PairCertificate,
    Sensitivity,
    compose,
)
from lben.certificates.certify import certify, certify_pairs
from lben.certificates.convolutional import certify_convolution, certify_pooled
from lben.certificates.linf import LinfClaim, certify_linf, interval_bounds
from lben.certificates.sensitivity import sensitivity

__all__ = [
    "AnyWeights",
    "Certificate",
    "CertificateError",
    "Claim",
    "LinfClaim",
    "NetworkCertificate",
    "PairCertificate",
    "Sensitivity",
    "certify",
    "certify_convolution",
    "certify_linf",
    "certify_pairs",
    "certify_pooled",
    "compose",
    "interval_bounds",
    "sensitivity",
]
