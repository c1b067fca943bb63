"""What is known of a network's activation? Its slopes, its kinks, its curvature between them.

An equilibrium layer's σ is a proximal operator (`solvers.ProximalActivation`): its slopes lie in
[0, 1], and it can be solved with. An ordinary network may have any function of one number, and a
proof needs three facts about it. Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A function σ of one number.

    Attributes:
        name: of the function, with its parameters: two activations of one name are the same.
        low, high: every chord of σ has its slope in [low, high].
        knots: where the slope jumps, increasing.
        curvature: a Lipschitz constant of the slope between knots; 0 if σ is piecewise linear.
        function: σ in float64, entry by entry.
        relative_error, absolute_error: |fl(σ(v)) − σ(v)| is at most relative_error·|fl(σ(v))| +
            absolute_error.

    Raises:
        ValueError: if low is above high, or the knots do not increase.

    Example:
        >>> import torch
        >>> from lben.weights.activation import RELU
        >>> RELU(torch.tensor([-1.0, 2.0])).tolist(), RELU.low, RELU.high, RELU.knots
        ([0.0, 2.0], 0.0, 1.0, (0.0,))
    """

    name: str
    low: float
    high: float
    knots: tuple[float, ...] = ()
    curvature: float = 0.0
    function: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    relative_error: float = 0.0
    absolute_error: float = 0.0

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"slopes must be in order, got [{self.low}, {self.high}]")
        if list(self.knots) != sorted(set(self.knots)):
            raise ValueError(f"knots must increase, got {self.knots}")

    def __call__(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return σ(v)."""
        return self.function(v)


RELU = Activation(name="ReLU", low=0.0, high=1.0, knots=(0.0,), function=torch.relu)
IDENTITY = Activation(name="Identity", low=1.0, high=1.0, function=lambda v: v)
