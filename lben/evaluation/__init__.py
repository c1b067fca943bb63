"""What a trained model holds: accuracy, proofs, attacks, and their reports."""

from lben.evaluation.accuracy import EvaluationConfig, Report, evaluate
from lben.evaluation.proofs import Certification, CertificationConfig, Method, certify_model

__all__ = [
    "Certification",
    "CertificationConfig",
    "EvaluationConfig",
    "Method",
    "Report",
    "certify_model",
    "evaluate",
]
