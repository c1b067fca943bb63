"""How far is the output of a layer that runs from the exact output, at one input and in a ball?

A layer that runs rounds its numbers, and an equilibrium layer leaves a residual. The exact layer
has the same weights, and is solved and evaluated in real arithmetic. At an input where the layer
has run, its state and residual bound the distance of the two outputs. At another input nothing has
been computed yet. There the layer's tolerance and the size of its state bound the distance. This
bound grows at most linearly with the distance from the input where the layer has run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

_OUTWARDS = 1 + 2.0**-40
"""Far above the rounding of the few float64 operations here."""


@dataclass(frozen=True, eq=False)
class Affine:
    """A bound that grows with the radius r of a ball: constant + slope·r, one ball per sample.

    Args:
        constant: per sample, float64.
        slope: the same for all samples.
        limit: per sample, the largest r for which the bound holds; beyond it a number may overflow.

    Example:
        >>> import torch
        >>> bound = Affine(torch.tensor([1.0], dtype=torch.float64), 2.0)
        >>> bound.at(3.0).round(decimals=6)
        tensor([7.], dtype=torch.float64)
    """

    constant: Float[Tensor, "*batch"]
    slope: float
    limit: Float[Tensor, "*batch"] | float = math.inf

    def at(self, radius: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """Return the bound for a radius."""
        bound = (self.constant + self.slope * radius) * _OUTWARDS
        known = ~bound.isnan() & (_to_tensor(radius, bound) <= _to_tensor(self.limit, bound))
        return torch.where(known, bound, torch.inf)

    def select(self, index: Tensor) -> Affine:
        """Return the bound of some samples."""
        limit = self.limit[index] if isinstance(self.limit, Tensor) else self.limit
        return Affine(self.constant[index], self.slope, limit)

    def reshape(self, batch: torch.Size) -> Affine:
        """Return the same bounds for other batch dimensions."""
        limit = self.limit.reshape(batch) if isinstance(self.limit, Tensor) else self.limit
        return Affine(self.constant.reshape(batch), self.slope, limit)

    def __add__(self, other: Affine) -> Affine:
        return Affine(
            (self.constant + other.constant) * _OUTWARDS,
            (self.slope + other.slope) * _OUTWARDS,
            _take_least(self.limit, other.limit),
        )

    def __mul__(self, factor: float) -> Affine:
        """Scale by a non-negative number; ∞ · 0 is ∞."""
        constant = (self.constant * factor * _OUTWARDS).nan_to_num(nan=torch.inf, posinf=torch.inf)
        slope = self.slope * factor * _OUTWARDS
        return Affine(constant, math.inf if math.isnan(slope) else slope, self.limit)

    def after(self, inner: Affine) -> Affine:
        """Return the bound as a function of r, for a radius of at most inner(r)."""
        reach = self.limit - inner.constant * _OUTWARDS
        if inner.slope:
            reach = reach / (inner.slope * _OUTWARDS)
        else:
            reach = torch.where(reach >= 0, torch.inf, -torch.inf)
        constant = self.at(inner.constant)
        limit = _take_least(inner.limit, reach.nan_to_num(nan=-1.0))
        return Affine(constant, (Affine(constant, self.slope) * inner.slope).slope, limit)


def _take_least(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    if isinstance(a, float) and isinstance(b, float):
        return min(a, b)
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    return torch.minimum(_to_tensor(a, like), _to_tensor(b, like))


def _to_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_tensor(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Certified:
    """The output of a layer as it runs, with proved bounds of its distance to the exact output.

    Attributes:
        value: y, in the precision that the layer runs in.
        error: bound of ‖y − y*‖₂ per sample, float64, where y* is the exact output for the same x.
        uniform: bound of the same distance at every input within a radius of x, in the l2 norm of
            the layer's input. It holds for a layer that runs there with the same settings and meets
            its tolerance. None if no such bound is known; then no radius of the network as it runs
            can be certified.
        steps: most solver iterations that a sample needed; 0 for a layer without a solve.

    Example:
        >>> import torch
        >>> from lben import SLLLinear
        >>> layer = SLLLinear(4, 6)
        >>> found = layer.forward_with_error(torch.ones(2, 4), layer.certificate())
        >>> found.value.shape, found.error.shape, found.steps
        (torch.Size([2, 4]), torch.Size([2]), 0)
    """

    value: Tensor
    error: Float[Tensor, "*batch"]
    uniform: Affine | None = None
    steps: int = 0

    def reshape(self, batch: torch.Size) -> Self:
        """Return the same for other batch dimensions."""
        return replace(
            self, value=self.value.reshape(*batch, *self.value.shape[1:]),
            error=self.error.reshape(batch),
            uniform=None if self.uniform is None else self.uniform.reshape(batch),
        )  # fmt: skip

    def after(self, error_in: Float[Tensor, "*batch"] | float, bound: float) -> Self:
        """Return the output with bounds for an x that has an error of at most `error_in` itself.

        Args:
            error_in: bound of ‖x − x*‖₂ per sample; y* is then the exact output for x*.
            bound: a Lipschitz bound of the exact layer.
        """
        if isinstance(error_in, float) and error_in == 0:
            return self
        return replace(self, error=_propagate(error_in, bound, self.error))


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """The gain and the error bounds of the first layers of a chain, in terms of the chain's input.

    Attributes:
        gain: a Lipschitz bound of the exact chain so far.
        error, uniform: as of `Certified`, for the chain so far.
        steps: most solver iterations so far.

    Example:
        >>> import torch
        >>> start = Stage.start(torch.zeros(1, 4))
        >>> error = torch.tensor([0.5], dtype=torch.float64)
        >>> layer = Certified(value=torch.zeros(1, 4), error=error, uniform=Affine(error, 0.0))
        >>> start.then(layer, bound=2.0).then(layer, bound=2.0).error.round(decimals=6)  # 2 · ½ + ½
        tensor([1.5000], dtype=torch.float64)
    """

    gain: float
    error: Float[Tensor, "*batch"]
    uniform: Affine
    steps: int = 0

    @classmethod
    def start(cls, x: Tensor) -> Stage:
        """Return the stage before the first layer: x is exact and the gain is 1."""
        nothing = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return cls(gain=1.0, error=nothing, uniform=Affine(nothing, 0.0))

    @property
    def reach(self) -> Affine:
        """How far the value moves within the ball, for the chain as it runs.

        Let F be the chain as it runs and f the exact chain. Then
        ‖F(x') − F(x)‖ ≤ ‖F(x') − f(x')‖ + ‖f(x') − f(x)‖ + ‖f(x) − F(x)‖.
        """
        return self.uniform + Affine(self.error, self.gain)

    def then(self, layer: Certified, bound: float) -> Stage:
        """Return the stage after one more layer.

        Args:
            layer: evaluated at the value of this stage.
            bound: a Lipschitz bound of the exact layer.
        """
        own = layer.uniform
        if own is None:
            own = Affine(torch.full_like(self.error, math.inf), math.inf)
        return Stage(
            gain=self.gain * bound * _OUTWARDS,
            error=_propagate(self.error, bound, layer.error),
            uniform=self.uniform * bound + own.after(self.reach),
            steps=max(self.steps, layer.steps),
        )


def _propagate(error_in: Tensor | float, bound: float, own: Tensor) -> Tensor:
    """Return a bound of the error after a layer: bound · error_in + own."""
    before = torch.as_tensor(error_in, dtype=torch.float64, device=own.device) * bound
    return (before.nan_to_num(nan=torch.inf, posinf=torch.inf) + own.double()) * _OUTWARDS
