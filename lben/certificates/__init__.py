"""Proofs about explicit weights, and nothing else.

A certificate sees explicit weights alone, never how they came about, so a bug in a
parameterization can cost tightness or make the proof fail, never make a bound wrong.
"""

from lben.certificates.dense import certify, certify_pairs
from lben.certificates.images import certify_convolution, certify_pooled
from lben.certificates.largest import LargestClaim, certify_largest, interval_bounds
from lben.certificates.records import (
    AnyWeights,
    Certificate,
    CertificateError,
    Claim,
    NetworkCertificate,
    PairCertificate,
    Sensitivity,
    compose,
)
from lben.certificates.sensitivity import sensitivity

__all__ = [
    "AnyWeights",
    "Certificate",
    "CertificateError",
    "Claim",
    "LargestClaim",
    "NetworkCertificate",
    "PairCertificate",
    "Sensitivity",
    "certify",
    "certify_convolution",
    "certify_largest",
    "certify_pairs",
    "certify_pooled",
    "compose",
    "interval_bounds",
    "sensitivity",
]
