"""How accurate and how robust is a trained model? Accuracy, proofs, attacks, and reports."""

from lben.evaluation.accuracy import EvaluationConfig, Report, evaluate
from lben.evaluation.proofs import Certification, CertificationConfig, Method, evaluate_certificates

__all__ = [
    "Certification",
    "CertificationConfig",
    "EvaluationConfig",
    "Method",
    "Report",
    "evaluate",
    "evaluate_certificates",
]
