"""How accurate and how robust is a trained model? Accuracy, proofs, attacks, and reports."""

from lben.evaluation.accuracy import EvaluationConfig, Report, evaluate
from lben.evaluation.files import Samples, read_model, read_samples
from lben.evaluation.proofs import Certification, CertificationConfig, Method, evaluate_certificates
from lben.evaluation.robustness import Robustness, RobustnessConfig, evaluate_robustness

__all__ = [
    "Certification",
    "CertificationConfig",
    "EvaluationConfig",
    "Method",
    "Report",
    "Robustness",
    "RobustnessConfig",
    "Samples",
    "evaluate",
    "evaluate_certificates",
    "evaluate_robustness",
    "read_model",
    "read_samples",
]
