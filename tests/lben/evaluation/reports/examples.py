"""Reports of two radii, made up."""

from lben.evaluation.accuracy import EvaluationConfig, Report
from lben.evaluation.proofs import TEXTBOOK, Certification, CertificationConfig, Method


def evaluation(**changes):
    figures = {
        "data": "digits", "samples": 360, "attack_samples": 20, "radii": (0.0, 0.5),
        "clean_accuracy": 0.9, "certified_accuracy": (0.9, 0.4), "certified_exact": (0.9, 0.45),
        "certified_attacked": (0.95, 0.5), "pgd_accuracy": (0.95, 0.75), "gamma": 2.0, "bound": 5.0,
        "promised_bound": 5.5, "quotient": 4.0, "tightness": 1.375, "pairs": 205, "violations": 0,
        "smallest_eigenvalue": 0.01, "m": 0.5, "dtype": "float32", "tol": 1e-4,
        "max_logit_error": 2e-4, "solver_steps": 17, "seconds": 3.0,
        "config": EvaluationConfig(radii=(0.0, 0.5)), "environment": {},
    }  # fmt: skip
    return Report(**{**figures, **changes})


def method(name, *certified):
    return Method(name=name, bound=5.0, certified=certified, seconds=0.5, seconds_per_image=0.002)


def certification(**changes):
    figures = {
        "data": "digits", "samples": 40, "available": 360, "radii": (0.1, 0.4),
        "clean_accuracy": 0.9, "dtype": "float32", "tol": 1e-4,
        "methods": (method(TEXTBOOK, 0.85, 0.5), method("scaled", 0.8, 0.4)),
        "attacked": (0.85, 0.6), "violations": 0, "in_linf": (method("intervals", 0.7, 0.1),),
        "seconds": 21.0, "config": CertificationConfig(radii=(0.1, 0.4), linf_radii=(0.01, 0.02)),
        "environment": {},
    }  # fmt: skip
    return Certification(**{**figures, **changes})
