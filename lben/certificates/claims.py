"""What is to be proved? A bound, and the multiplier that is said to show it.

Claims are proposals: nothing about them is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lben.rigorous import Array


@dataclass(frozen=True, eq=False)
class Claim:
    """That x ↦ y, or a difference of two outputs, is γ-Lipschitz in l2.

    Attributes:
        gamma: γ, or None for well-posedness alone.
        Lambda: the multiplier Λ in M(Λ, γ), n positive numbers.

    Example:
        >>> import torch
        >>> from lben import SLLLinear, certify
        >>> weights = SLLLinear(4, 6).weights()
        >>> certify(weights, Claim(1.5, weights.Lambda)).bound
        1.5
    """

    gamma: float | None
    Lambda: Float[Tensor, " n"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LinfClaim:
    """That an output changes by at most √(Σ τₖ Δxₖ²), and so by at most √Στ · max |Δxₖ|.

    Attributes:
        tau: τ, one positive number per input.
        Lambda: the multiplier that is said to show it, n positive numbers.

    Example:
        >>> import numpy as np
        >>> from lben import EquilibriumLinear, certify, tighten_linf
        >>> weights = EquilibriumLinear(4, 6, 2).weights()
        >>> claims = tighten_linf(weights)
        >>> isinstance(claims[0, 1], LinfClaim), certify(weights, claims).norm
        (True, 'linf')
    """

    tau: Array
    Lambda: Array


@dataclass(frozen=True)
class IntervalClaim:
    """That intervals bound differences of outputs per max |Δxₖ|: whatever they show is proved.

    Example:
        >>> from lben import EquilibriumLinear, certify
        >>> certify(EquilibriumLinear(4, 6, 2).weights(), IntervalClaim()).method
        'intervals, with rounding enclosed'
    """
