"""What is known of a network's activation? Its slopes, its kinks, its curvature between them.

An equilibrium layer's σ is a proximal operator (`solvers.ProximalActivation`): its slopes lie in
[0, 1], and it can be solved with. An ordinary network may have any function of one number, and a
proof needs three facts about it. Symbols: docs/glossary.md.

Note [Facts about activations]
Slopes and curvatures are rounded outwards. They are known by formulas for functions of tanh v,
1/(1 + e^(−v)) or eᵛ, of which slope and curvature are polynomials. For the others (GELU, SiLU,
Mish) the numbers are the extremes, found numerically. Irrational ones are raised by 10⁻⁹. Tests
prove all of them: by Bernstein coefficients in rational arithmetic, or by interval arithmetic over
the whole line.

Note [Rounding of functions]
exp, expm1, log1p, tanh and erf of PyTorch in float64 were measured to be accurate to 2 units in
the last place. A function of them is charged with 64 roundings, relative to its value. Where it
subtracts nearly equal numbers (1 + erf v), it is charged with 64 roundings of a number below 16
besides. In float32 the same counts of roundings hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lben.rigorous import UNIT, up


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


_ROUNDED = 32 * UNIT
"""64 roundings to nearest, see Note [Rounding of functions]."""
_LOST = 2.0**-1000
"""What may underflow."""


def _check(name: str, value: float, condition: bool, expected: str) -> float:
    if not (math.isfinite(value) and condition):
        raise ValueError(f"{name} must be {expected}, got {value}")
    return float(value)


def make_leaky_relu(negative_slope: float) -> Activation:
    """Return σ(v) = v for v ≥ 0, av for v < 0.

    Args:
        negative_slope: a, any number.

    Raises:
        ValueError: if a is not finite.

    Example:
        >>> from lben.weights.activation import make_leaky_relu
        >>> make_leaky_relu(-0.5).low, make_leaky_relu(2.0).high
        (-0.5, 2.0)
    """
    a = _check("negative_slope", negative_slope, True, "finite")
    return Activation(
        name=f"LeakyReLU({a!r})", low=min(a, 1.0), high=max(a, 1.0), knots=(0.0,),
        function=partial(functional.leaky_relu, negative_slope=a),
        relative_error=2 * UNIT, absolute_error=_LOST,
    )  # fmt: skip


def make_hardtanh(least: float, largest: float) -> Activation:
    """Return σ(v) = v, cut off at two numbers; ReLU6 is the one of 0 and 6.

    Args:
        least, largest: in this order.

    Raises:
        ValueError: if they are not finite, or not in order.

    Example:
        >>> import torch
        >>> from lben.weights.activation import make_hardtanh
        >>> make_hardtanh(0.0, 6.0)(torch.tensor([-1.0, 2.0, 7.0])).tolist()
        [0.0, 2.0, 6.0]
    """
    a = _check("the least value", least, math.isfinite(largest), "finite, as the largest")
    b = _check("the largest value", largest, a < largest, f"above {a}")
    # In float32 both numbers are rounded.
    return Activation(
        name=f"Hardtanh({a!r}, {b!r})", low=0.0, high=1.0, knots=(a, b),
        function=partial(torch.clamp, min=a, max=b), relative_error=UNIT, absolute_error=_LOST,
    )  # fmt: skip


def make_softshrink(threshold: float) -> Activation:
    """Return σ(v) = v − t for v > t, v + t for v < −t, and 0 between.

    Args:
        threshold: t > 0.

    Raises:
        ValueError: if t is not positive and finite.

    Example:
        >>> import torch
        >>> from lben.weights.activation import make_softshrink
        >>> make_softshrink(0.5)(torch.tensor([-1.0, 0.25, 2.0])).tolist()
        [-0.5, 0.0, 1.5]
    """
    t = _check("threshold", threshold, threshold > 0, "positive")
    return Activation(
        name=f"Softshrink({t!r})", low=0.0, high=1.0, knots=(-t, t),
        function=partial(functional.softshrink, lambd=t),
        relative_error=2 * UNIT, absolute_error=up(2 * UNIT * t) + _LOST,
    )  # fmt: skip


def make_softplus(beta: float = 1.0) -> Activation:
    """Return σ(v) = log(1 + e^(βv))/β.

    torch.nn.Softplus returns v where βv is above its threshold, and jumps there. This function does
    not: its threshold is 60, where e^(−60) is below rounding.

    Args:
        beta: β > 0.

    Raises:
        ValueError: if β is not positive and finite.

    Example:
        >>> from lben.weights.activation import make_softplus
        >>> softplus = make_softplus(2.0)
        >>> softplus.low, softplus.high, softplus.curvature
        (0.0, 1.0, 0.5)
    """
    beta = _check("beta", beta, beta > 0, "positive")
    return Activation(
        name=f"Softplus({beta!r})", low=0.0, high=1.0, curvature=beta / 4,
        function=partial(functional.softplus, beta=beta, threshold=60.0),
        relative_error=_ROUNDED, absolute_error=_LOST,
    )  # fmt: skip


def make_elu(alpha: float = 1.0) -> Activation:
    """Return σ(v) = v for v > 0, α(eᵛ − 1) for v ≤ 0.

    Args:
        alpha: α, any number.

    Raises:
        ValueError: if α is not finite.

    Example:
        >>> from lben.weights.activation import make_elu
        >>> make_elu(2.0).high, make_elu(1.0).knots, make_elu(0.5).knots
        (2.0, (), (0.0,))
    """
    a = _check("alpha", alpha, True, "finite")
    return Activation(
        name=f"ELU({a!r})", low=min(a, 0.0), high=max(a, 1.0), knots=() if a == 1 else (0.0,),
        curvature=abs(a), function=partial(functional.elu, alpha=a),
        relative_error=_ROUNDED, absolute_error=_LOST,
    )  # fmt: skip


def make_celu(alpha: float = 1.0) -> Activation:
    """Return σ(v) = v for v > 0, α(e^(v/α) − 1) for v ≤ 0.

    Args:
        alpha: α > 0.

    Raises:
        ValueError: if α is not positive and finite.

    Example:
        >>> from lben.weights.activation import make_celu
        >>> make_celu(2.0).low, make_celu(2.0).high, make_celu(2.0).curvature
        (0.0, 1.0, 0.5000000000000001)
    """
    a = _check("alpha", alpha, alpha > 0, "positive")
    return Activation(
        name=f"CELU({a!r})", low=0.0, high=1.0, curvature=up(1 / a),
        function=partial(functional.celu, alpha=a), relative_error=_ROUNDED, absolute_error=_LOST,
    )  # fmt: skip


def _smooth(
    name: str, low: float, high: float, curvature: float, function: Callable[[Tensor], Tensor],
    absolute_error: float = _LOST,
) -> Activation:  # fmt: skip
    return Activation(
        name=name, low=low, high=high, curvature=curvature, function=function,
        relative_error=_ROUNDED, absolute_error=absolute_error,
    )  # fmt: skip


RELU = Activation(name="ReLU", low=0.0, high=1.0, knots=(0.0,), function=torch.relu)
IDENTITY = Activation(name="Identity", low=1.0, high=1.0, function=torch.clone)
ABS = Activation(name="Abs", low=-1.0, high=1.0, knots=(0.0,), function=torch.abs)
RELU6 = make_hardtanh(0.0, 6.0)
TANH = _smooth("Tanh", 0.0, 1.0, 0.7698003600, torch.tanh)  # 4/(3√3)
SIGMOID = _smooth("Sigmoid", 0.0, 0.25, 0.0962250459, torch.sigmoid)  # 1/(6√3)
LOG_SIGMOID = _smooth("LogSigmoid", 0.0, 1.0, 0.25, functional.logsigmoid)
SOFTSIGN = _smooth("Softsign", 0.0, 1.0, 2.0, functional.softsign)
# SELU(v) = λv for v > 0, λα(eᵛ − 1) for v ≤ 0, with λ and α as in torch; 1.7580993408… = λα.
SELU = Activation(
    name="SELU", low=0.0, high=1.7580993409, knots=(0.0,), curvature=1.7580993409,
    function=functional.selu, relative_error=_ROUNDED, absolute_error=_LOST,
)  # fmt: skip
GELU = _smooth("GELU", -0.1289041462, 1.1289041462, 0.7978845619, functional.gelu, 16 * _ROUNDED)
GELU_TANH = _smooth(
    "GELU(tanh)", -0.1289930697, 1.1289930697, 0.7978845619,
    partial(functional.gelu, approximate="tanh"), 16 * _ROUNDED,
)  # fmt: skip
SILU = _smooth("SiLU", -0.0998393212, 1.0998393212, 0.500000001, functional.silu)
MISH = _smooth("Mish", -0.1125261234, 1.0884981623, 0.6442046384, functional.mish)
HARDSWISH = Activation(  # v(v + 3)/6 between −3 and 3
    name="Hardswish", low=-0.5, high=1.5, knots=(-3.0, 3.0), curvature=up(1 / 3),
    function=functional.hardswish, relative_error=_ROUNDED, absolute_error=_LOST,
)  # fmt: skip
HARDSIGMOID = Activation(  # (v + 3)/6 between −3 and 3
    name="Hardsigmoid", low=0.0, high=up(1 / 6), knots=(-3.0, 3.0),
    function=functional.hardsigmoid, relative_error=_ROUNDED, absolute_error=_ROUNDED,
)  # fmt: skip
