"""What does a fused loop need to know of a splitting and of an activation?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.activations import LeakyReLU, LinearSlope, ProximalActivation, Step
from solvers.operators import Map


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One splitting as a fused loop runs it: x ← (1 − θ)x + θ(s + ρ(x)M), z = prox(x).

    Attributes:
        map: M, kept by the operator's memo.
        alpha: step sizes.
        reflected: whether ρ is the reflected prox and s = αv(I + M); else ρ = prox and s = αv.
        relaxation: θ.
    """

    map: Map
    alpha: Step
    reflected: bool
    relaxation: float = 1.0

    @property
    def done(self) -> int:
        """Steps that the loop has done when it enters: forward–backward's first."""
        return 0 if self.reflected else 1


def coefficients(activation: ProximalActivation) -> tuple[Tensor | None, float]:
    """Return d of σ(v) = dv per sample, or a of σ(v) = max(v, av)."""
    match activation:
        case LinearSlope(d=d):
            return plain(d), 0.0
        case LeakyReLU(negative_slope=a):
            return None, a
        case _:
            return None, 0.0


def plain(tensor: Tensor) -> Tensor:
    """Return the numbers in order in memory, with no negation pending."""
    return tensor.resolve_neg().contiguous()
