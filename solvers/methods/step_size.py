"""Which step size should a splitting use, and what does each rule guarantee?

A rule maps an operator to α > 0: one number for all units, or one number per unit. With one number
per unit the iteration is the same in another metric: for P = diag(α), P(I − W) is monotone in
⟨·, ΛP⁻¹·⟩ and prox_{αf} is separable, so Peaceman–Rachford keeps its guarantee for every α > 0.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from solvers.activations import Step
from solvers.operators import LinearOperator


class StepSizeRule(ABC):
    """Compute α from an operator: `rule(operator)`; a subclass is a frozen dataclass.

    Example:
        >>> from solvers import DenseOperator
        >>> ForwardStep()(DenseOperator(torch.zeros(2, 2, dtype=torch.float64))) <= 1.0
        True
    """

    @abstractmethod
    def __call__(self, operator: LinearOperator) -> Step:
        """Return α for this operator, one positive number or one per unit."""


@dataclass(frozen=True)
class Determinant(StepSizeRule):
    """Choose α = |det(I − W)|^(−1/n), the inverse geometric mean of the eigenvalues' moduli.

    Peaceman–Rachford converges at any α > 0. In practice this one lies within a few per cent of the
    best constant step, and it costs one LU. It centres the spectrum of I − W on a logarithmic
    scale, where |1 − αλ| / |1 + αλ| is the same for αλ and 1/(αλ). The determinant is the same for
    W, for Wᵀ and for DWD⁻¹ with any diagonal D. If I − W is singular, and so not strongly monotone,
    α = 1.

    Example:
        >>> from solvers import DenseOperator
        >>> round(Determinant()(DenseOperator(torch.diag(torch.tensor([-3.0, -3.0])))), 4)
        0.25
    """

    def __call__(self, operator: LinearOperator) -> float:
        mean = operator.mean_log_eigenvalue()
        return math.exp(-mean) if math.isfinite(mean) else 1.0


@dataclass(frozen=True)
class JacobiDeterminant(StepSizeRule):
    """Choose αᵢ = δ / (1 − Wᵢᵢ) with δ = |det(I − W) / Πᵢ(1 − Wᵢᵢ)|^(−1/n).

    δ is the determinant rule of the problem that is scaled such that Λ(I − W) has a diagonal of
    ones, which is Jacobi's preconditioner. In the original variables it is one step per unit. If a
    resolvent cannot serve any α, `LinearOperator.preconditioner` replaces the diagonal of W. If
    I − W is strongly monotone in any diagonal metric, then 1 − Wᵢᵢ ≥ m > 0.

    Raises:
        ValueError: on a call, if some 1 − Wᵢᵢ ≤ 0.

    Example:
        >>> from solvers import DenseOperator
        >>> JacobiDeterminant()(DenseOperator(torch.diag(torch.tensor([-1.0, -3.0]))))
        tensor([0.5000, 0.2500])
    """

    def __call__(self, operator: LinearOperator) -> torch.Tensor:
        diagonal = 1 - operator.preconditioner()
        if not bool((diagonal > 0).all()):
            raise ValueError(
                f"1 − Wᵢᵢ must be positive for every unit, got {float(diagonal.min()):.3g}: "
                "I − W is not monotone in any diagonal metric (check the weights' certificate)"
            )
        log_scale = float(diagonal.double().log().mean()) - operator.mean_log_eigenvalue()
        return math.exp(log_scale) / diagonal


@dataclass(frozen=True)
class InverseGeometricMean(StepSizeRule):
    """Choose α = 1/√(mL), which minimises the worst-case factor of Peaceman–Rachford.

    Reference: Lions and Mercier (1979), Remark 8; Giselsson and Boyd (2017), Corollary 1.

    Raises:
        ValueError: on a call, if m ≤ 0.

    Example:
        >>> from solvers import DenseOperator
        >>> W = DenseOperator(torch.diag(torch.tensor([0.0, -3.0])))
        >>> round(InverseGeometricMean()(W), 4)  # m = 1, L = 4
        0.5
    """

    def __call__(self, operator: LinearOperator) -> float:
        constants = operator.constants()
        _require_monotone(constants.m)
        return 1 / math.sqrt(constants.m * constants.L)


@dataclass(frozen=True)
class ForwardStep(StepSizeRule):
    """Choose α = m/L², half the limit 2m/L² below which forward–backward splitting contracts.

    It minimises √(1 − 2αm + α²L²), the bound of the factor in the Λ norm.
    Reference: Ryu and Boyd (2016), section 5.

    Raises:
        ValueError: on a call, if m ≤ 0.

    Example:
        >>> from solvers import DenseOperator
        >>> W = DenseOperator(torch.diag(torch.tensor([0.0, -3.0])))
        >>> round(ForwardStep()(W), 4)  # m = 1, L = 4
        0.0625
    """

    def __call__(self, operator: LinearOperator) -> float:
        constants = operator.constants()
        _require_monotone(constants.m)
        return constants.m / constants.L**2


def check_step_size(step: object) -> None:
    """Check that this is a step-size rule or a positive number.

    Raises:
        TypeError: if it is neither a rule nor a number.
        ValueError: if a number is not positive and finite.
    """
    if isinstance(step, StepSizeRule):
        return
    if isinstance(step, bool) or not isinstance(step, numbers.Real):
        take = f"{step.__name__}()" if isinstance(step, type) else "JacobiDeterminant() or a number"
        raise TypeError(f"step_size must be a number or a StepSizeRule, got {step!r}: pass {take}")
    if not 0 < float(step) < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {step}")


def choose_step_size(rule: float | StepSizeRule, operator: LinearOperator) -> Step:
    """Return α: of a rule, which is evaluated once per operator, or the number itself."""
    if isinstance(rule, StepSizeRule):
        return operator.memo(("step", rule), lambda: rule(operator))
    return float(rule)


def _require_monotone(m: float) -> None:
    if m <= 0:
        raise ValueError(
            f"this step-size rule needs a strongly monotone I − W, but m = {m:.3g} ≤ 0 in the Λ "
            "norm: check the weights with their certificate, or use PeacemanRachford(), whose "
            "default rule does not need m"
        )
