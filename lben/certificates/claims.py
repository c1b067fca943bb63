"""What is to be proved? A claim: a bound γ, and a multiplier Λ with which it can be proved.

Claims are proposals: nothing about them is believed.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lben.rigorous import Array


@dataclass(frozen=True, eq=False)
class Claim:
    """The claim that x ↦ y, or a difference of two outputs, is γ-Lipschitz in l2.

    Attributes:
        gamma: γ, or None for well-posedness alone.
        Lambda: the multiplier Λ in M(Λ, γ), n positive numbers.
        gap: how far γ may be above the least bound that any Λ shows, relative to γ; None where it
            is not known. It is the estimate of whoever proposes the claim, and is not proved.

    Example:
        >>> import torch
        >>> from lben import SLLLinear, certify
        >>> weights = SLLLinear(4, 6).weights()
        >>> certify(weights, Claim(1.5, weights.Lambda)).bound
        1.5
    """

    gamma: float | None
    Lambda: Float[Tensor, " n"]
    gap: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LinfClaim:
    """The claim that an output changes by at most √(Σ τₖ Δxₖ²).

    It follows that the output changes by at most √(Σ τₖ) · max |Δxₖ|.

    Attributes:
        tau: τ, one positive number per input.
        Lambda: the multiplier Λ with which the claim can be proved, n positive numbers.

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
    """The request to bound |Δyᵢ − Δyⱼ| ÷ max |Δxₖ| by intervals for every pair of outputs.

    It names no bound: the certificate holds the bounds that intervals prove.

    Example:
        >>> from lben import EquilibriumLinear, certify
        >>> certify(EquilibriumLinear(4, 6, 2).weights(), IntervalClaim()).method
        'intervals, with rounding enclosed'
    """
