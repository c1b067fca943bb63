"""Which activations are proximal operators, and what is their prox at step α?

Every σ here is non-decreasing and 1-Lipschitz, hence σ = prox_f of a convex f on the line. A
splitting with step α needs prox_{αf}. With z = σ(p) and f'(z) = p − z, the optimality condition
z + α f'(z) = x reads

    (1 − α) σ(p) + α p = x,        prox_{αf}(x) = σ(p),

one monotone scalar equation in the pre-activation p. For projections (ReLU) it gives σ itself at
every α; for all others it does not, and using σ in its place converges to a wrong point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from solvers.dependencies import Sendable

Step = float | Tensor
"""A positive step size: one number, or one per unit (shape (n,))."""


class ProximalActivation(ABC):
    """An elementwise activation σ that is the prox of a convex function.

    Laws, each tested for every subclass: prox(x, 1) = σ(x); prox(·, α) is firmly non-expansive;
    slope(σ(v)) = σ'(v) wherever σ is differentiable; reflector(α)(x) = 2 prox(x, α) − x.
    `solvers.testing.ActivationLaws` tries them on an activation of your own.

    Example:
        >>> import torch
        >>> from solvers import ProximalActivation
        >>> class Arctan(ProximalActivation):
        ...     def __call__(self, v):
        ...         return torch.atan(v)
        ...     def slope(self, z):
        ...         return torch.cos(z).square()
        >>> x = torch.tensor([1.0], dtype=torch.float64)
        >>> p = Arctan().prox(x, 0.5).tan()  # prox(x, α) = σ(p)
        >>> torch.allclose(0.5 * torch.atan(p) + 0.5 * p, x)
        True
    """

    @abstractmethod
    def __call__(self, v: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return σ(v)."""

    @abstractmethod
    def slope(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return σ'(σ⁻¹(z)) in [0, 1], from the output z alone; differentiable in z."""

    @property
    def ulps(self) -> float:
        """How far σ(v) as computed may be from σ(v): this many eps of |σ(v)|.

        Besides, 2 of the smallest normal number for what underflows. 8 unless a subclass says
        another number, above what the elementary functions of PyTorch were measured at.
        """
        return 8.0

    def prox(self, x: Float[Tensor, "*batch n"], step: Step) -> Float[Tensor, "*batch n"]:
        """Return prox_{αf}(x) for step α > 0.

        Solves (1 − α) σ(p) + α p = x by Newton's method inside a bracket. The left side has
        slopes in [min(1, α), max(1, α)], so |p − q| ≤ |residual(q)| / min(1, α) brackets p from
        any q, and bisection halves the bracket whenever Newton leaves it.
        """
        approximations = self.approximations(x, step)
        before, value = next(approximations)
        for p, value in islice(approximations, _NEWTON_LIMIT):
            near = (p - before).abs() <= _NEWTON_ULPS * torch.finfo(x.dtype).eps * p.abs()
            if torch.equal(p, before) or bool(near.all()):
                return value
            before = p
        return value

    def approximations(self, x: Tensor, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ever better p and σ(p) of prox(x, step), without looking at their numbers."""
        alpha = step.to(x) if isinstance(step, Tensor) else x.new_full((), step)
        p = x / alpha.clamp_min(1)
        low: Tensor | None = None
        high: Tensor | None = None
        while True:
            value = self(p)
            yield p, value
            residual = torch.addcmul((1 - alpha) * value - x, alpha, p)
            if low is None or high is None:
                reach = residual.abs() / alpha.clamp_max(1)
                low, high = p - reach, p + reach
            low = torch.where(residual < 0, p, low)
            high = torch.where(residual > 0, p, high)
            newton = p - residual / torch.addcmul(alpha, 1 - alpha, self.slope(value))
            inside = (newton >= low) & (newton <= high)
            p = torch.where(inside, newton, 0.5 * (low + high))

    def reflector(self, step: Step) -> Callable[[Tensor], Tensor]:
        """Return x ↦ 2 prox_{αf}(x) − x for one step; the function may overwrite x."""
        return lambda x: self.prox(x, step).mul_(2).sub_(x)

    def slope_bounds(
        self,
        v: Float[Tensor, "*batch n"],
        reach: Float[Tensor, "*batch n"],
        error: Float[Tensor, "*batch n"],
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
        """Return bounds of the slopes (σ(p + t) − σ(p)) / t for |p − v| ≤ error and |t| ≤ reach.

        Rounded outwards, for float64 arguments. [0, 1] unless a subclass knows better.
        """
        return torch.zeros_like(v), torch.ones_like(v)

    def lower_lines(
        self, v: Float[Tensor, "*batch n"], error: Float[Tensor, "*batch n"]
    ) -> tuple[tuple[float, Float[Tensor, "*batch n"]], ...]:
        """Return slopes s and offsets o ≥ 0 of lines: σ(p + t) ≥ σ(p) + st − o for all t.

        That is for all |p − v| ≤ error; slopes are exact and offsets rounded upwards, for float64
        arguments. None unless a subclass knows better: only a convex σ lies above its tangents.
        """
        return ()

    def select(self, index: Tensor) -> ProximalActivation:
        """Return the activation of the samples in `index`; itself unless it differs by sample."""
        return self

    def part(self, units: slice) -> ProximalActivation:
        """Return the activation of the units in a slice; itself unless it differs by unit."""
        return self


# Note [Newton budget]
# Bisection alone needs about 60 halvings in float64 to reach the last bit from a bracket of
# relative width one; Newton needs 3 to 6 on these functions. Two ulps of movement are rounding.
_NEWTON_LIMIT = 80
_NEWTON_ULPS = 2.0

_OUTWARDS = 2.0**-45
"""What slopes are widened by: far above their rounding in float64."""
_TINY = 2.0**-1000


def _outwards(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return (low - _OUTWARDS).clamp_min(0), (high + _OUTWARDS).clamp_max(1)


def _peaked(activation: ProximalActivation, v: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Bound slope_bounds by the slopes between their ends: σ' is even and falls away from 0."""
    reach = reach * (1 + _OUTWARDS)
    near, far = (v.abs() - reach).clamp_min(0), v.abs() + reach
    return _outwards(*(activation.slope(activation(p)) for p in (far, near)))


@dataclass(frozen=True)
class ReLU(ProximalActivation):
    """σ(v) = max(v, 0), the projection onto the non-negative half-line: its own prox at any α.

    Example:
        >>> import torch
        >>> from solvers import ReLU
        >>> ReLU()(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    @property
    def ulps(self) -> float:
        return 0.0

    def __call__(self, v: Tensor) -> Tensor:
        return torch.relu(v)

    def slope(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)

    def prox(self, x: Tensor, step: Step) -> Tensor:
        return torch.relu(x)

    def reflector(self, step: Step) -> Callable[[Tensor], Tensor]:
        return Tensor.abs_  # 2 max(x, 0) − x = |x|

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        # From p > 0 a slope below 1 needs a step of −p, and is p/|t| or more; from p < 0 a slope
        # above 0 needs a step of |p|, and is 1 − |p|/|t| or less.
        distance = (v.abs() - error).clamp_min(0)
        share = torch.where(distance > reach, 1.0, distance / reach.clamp_min(_TINY))
        share = (share * (1 - _OUTWARDS)).clamp_max(1)
        share = torch.where(distance > reach * (1 + _OUTWARDS), 1.0, share)
        high = (1 - share) * (1 + _OUTWARDS)
        low = torch.where(v > 0, share, 0.0)
        return low, torch.where(v > 0, 1.0, high.clamp_max(1))

    def lower_lines(self, v: Tensor, error: Tensor) -> tuple[tuple[float, Tensor], ...]:
        return LeakyReLU(0.0).lower_lines(v, error)


@dataclass(frozen=True)
class LeakyReLU(ProximalActivation):
    """σ(v) = max(v, a·v) with 0 ≤ a ≤ 1.

    For x < 0 the scalar equation is linear: prox(x, α) = a x / (a + α(1 − a)).

    Args:
        negative_slope: a.

    Raises:
        ValueError: if a lies outside [0, 1].

    Example:
        >>> import torch
        >>> from solvers import LeakyReLU
        >>> x = torch.tensor([-1.0, 2.0])
        >>> LeakyReLU(0.5)(x).tolist(), LeakyReLU(0.5).prox(x, 3.0).tolist()
        ([-0.5, 2.0], [-0.25, 2.0])
    """

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        # A tensor could be written to later, and nobody would look again.
        object.__setattr__(self, "negative_slope", float(self.negative_slope))
        if not 0 <= self.negative_slope <= 1:
            raise ValueError(f"negative_slope must lie in [0, 1], got {self.negative_slope}")

    @property
    def ulps(self) -> float:
        return 2.0  # the slope, rounded to the dtype, and a product

    def __call__(self, v: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(v, self.negative_slope)

    def slope(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), self.negative_slope)

    def prox(self, x: Tensor, step: Step) -> Tensor:
        a = self.negative_slope
        if a == 0:
            return torch.relu(x)
        return torch.where(x > 0, x, x * (a / (a + step * (1 - a))))

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (
            self.negative_slope + (1 - self.negative_slope) * s
            for s in ReLU().slope_bounds(v, reach, error)
        )
        return _outwards(low, high)

    def lower_lines(self, v: Tensor, error: Tensor) -> tuple[tuple[float, Tensor], ...]:
        # Both branches: σ(p) − sp is (1 − a) max(±p, 0), and 0 where a branch is certain.
        larger = (1 - self.negative_slope) * (1 + _OUTWARDS)
        offsets = (torch.relu(error + side) for side in (v, -v))
        own, other = (torch.where(o > 0, larger * o + _TINY, 0.0) for o in offsets)
        return (self.negative_slope, own), (1.0, other)


@dataclass(frozen=True)
class Tanh(ProximalActivation):
    """σ(v) = tanh(v).

    Example:
        >>> import torch
        >>> from solvers import Tanh
        >>> Tanh().slope(Tanh()(torch.zeros(2))).tolist()  # 1 − z²
        [1.0, 1.0]
    """

    def __call__(self, v: Tensor) -> Tensor:
        return torch.tanh(v)

    def slope(self, z: Tensor) -> Tensor:
        return 1 - z * z

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return _peaked(self, v, reach + error)


@dataclass(frozen=True)
class Sigmoid(ProximalActivation):
    """σ(v) = 1 / (1 + e^(−v)); slopes lie in [0, 1/4].

    Example:
        >>> import torch
        >>> from solvers import Sigmoid
        >>> Sigmoid()(torch.zeros(1)).item(), Sigmoid().slope(torch.tensor([0.5])).item()
        (0.5, 0.25)
    """

    def __call__(self, v: Tensor) -> Tensor:
        return torch.sigmoid(v)

    def slope(self, z: Tensor) -> Tensor:
        return z * (1 - z)

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return _peaked(self, v, reach + error)


@dataclass(frozen=True)
class Softplus(ProximalActivation):
    """σ(v) = log(1 + eᵛ), whose slope in terms of the output is 1 − e^(−z).

    Example:
        >>> import torch
        >>> from solvers import Softplus
        >>> z = Softplus()(torch.zeros(1))
        >>> round(z.item(), 4), round(Softplus().slope(z).item(), 4)
        (0.6931, 0.5)
    """

    def __call__(self, v: Tensor) -> Tensor:
        # torch's default threshold of 20 makes σ jump down by 2e-9 there; e⁻⁴⁰ is below rounding.
        return torch.nn.functional.softplus(v, threshold=40.0)

    def slope(self, z: Tensor) -> Tensor:
        return -torch.expm1(-z)

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        far = (reach + error) * (1 + _OUTWARDS)
        return _outwards(torch.sigmoid(v - far), torch.sigmoid(v + far))


@dataclass(frozen=True, eq=False)
class LinearSlope(Sendable, ProximalActivation):
    """σ(v) = d ⊙ v with slopes d in [0, 1]: the "activation" of every adjoint problem.

    prox(x, α) = d x / (d + α(1 − d)), written without dividing by d, so dropped units (d = 0)
    stay exactly zero.

    Args:
        d: one slope per sample and unit.

    Example:
        >>> import torch
        >>> from solvers import LinearSlope
        >>> LinearSlope(torch.tensor([0.0, 0.5, 1.0])).prox(torch.ones(3), 1.0).tolist()
        [0.0, 0.5, 1.0]
    """

    d: Float[Tensor, "*batch n"]

    @property
    def ulps(self) -> float:
        return 1.0

    def __call__(self, v: Tensor) -> Tensor:
        return self.d * v

    def slope(self, z: Tensor) -> Tensor:
        return self.d

    def prox(self, x: Tensor, step: Step) -> Tensor:
        return x * (self.d / (self.d + step * (1 - self.d)))

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return self.d.expand_as(v), self.d.expand_as(v)

    def reflector(self, step: Step) -> Callable[[Tensor], Tensor]:
        factor = 2 * self.d / (self.d + step * (1 - self.d)) - 1
        return lambda x: x.mul_(factor)

    def select(self, index: Tensor) -> LinearSlope:
        return LinearSlope(self.d[index])

    def part(self, units: slice) -> LinearSlope:
        return LinearSlope(self.d[..., units])


@dataclass(frozen=True, eq=False)
class Masked(ProximalActivation):
    """σ where a mask is set and 0 elsewhere: the prox of f plus the indicator of 0.

    With it a convolution on a torus computes what zero padding does: units outside the image stay
    0. The sector condition holds with slope 0.

    Args:
        activation: σ.
        mask: one truth value per unit.

    Example:
        >>> import torch
        >>> from solvers import Masked, ReLU
        >>> Masked(ReLU(), torch.tensor([True, False]))(torch.ones(2)).tolist()
        [1.0, 0.0]
    """

    activation: ProximalActivation
    mask: Bool[Tensor, " n"] = field(repr=False)

    @property
    def ulps(self) -> float:
        return self.activation.ulps

    def __call__(self, v: Tensor) -> Tensor:
        return self._cut(self.activation(v))

    def slope(self, z: Tensor) -> Tensor:
        return self._cut(self.activation.slope(z))

    def prox(self, x: Tensor, step: Step) -> Tensor:
        return self._cut(self.activation.prox(x, step))

    def slope_bounds(self, v: Tensor, reach: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.activation.slope_bounds(v, reach, error)
        return self._cut(low), self._cut(high)

    def _cut(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0.0)

    def reflector(self, step: Step) -> Callable[[Tensor], Tensor]:
        inner = self.activation.reflector(step)

        def reflect(x: Tensor) -> Tensor:
            outside = -x  # before x is overwritten
            return torch.where(self.mask, inner(x), outside)

        return reflect

    def select(self, index: Tensor) -> Masked:
        return Masked(self.activation.select(index), self.mask)

    def part(self, units: slice) -> Masked:
        return Masked(self.activation.part(units), self.mask[units])


def check_activation(activation: object) -> None:
    """Check that this is a `ProximalActivation`.

    Raises:
        TypeError: if not, naming the one to take where there is one of the same name.
    """
    if isinstance(activation, ProximalActivation):
        return
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", None)
    name = type(activation).__name__ if name is None else name
    known = {"relu": "ReLU", "leakyrelu": "LeakyReLU", "tanh": "Tanh", "sigmoid": "Sigmoid",
             "softplus": "Softplus"}  # fmt: skip
    same = known.get(name.lower().replace("_", ""))
    take = f"solvers.{same}()" if same else "one of solvers, such as solvers.ReLU(), or your own"
    raise TypeError(f"activation must be a ProximalActivation, got {activation!r}: pass {take}")


PIECEWISE_LINEAR = (ReLU, LeakyReLU, LinearSlope)
"""Activations with two slopes, or one per sample, that change at zero only."""
