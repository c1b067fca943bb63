"""What is the least value of an output or pre-activation over a set of inputs? Multipliers tell.

Note [Dual bound]
Let v_k = Σ_j W_kj z_j + b_k and z_j = σ_j(v_j) be the equations of a network (`AffineSystem`), X a
set of inputs, and v_j ∈ [l_j, u_j] for all inputs in X. Let t be a target on level m: the bound is
one of tᵀv_m, for example of a difference of two outputs. Take any numbers τ_j, one vector for each
block, and let λ_j = τ_j, with t added at level m. Add the equations, weighted by λ: with

    g_j = Σ_k W_kjᵀ λ_k,

    tᵀv_m = Σ_j (g_jᵀ z_j − τ_jᵀ v_j) + g_0ᵀ x + Σ_k λ_kᵀ b_k
          ≥ Σ_j Σ_i min over v ∈ [l_ji, u_ji] of (g_ji σ_j(v) − τ_ji v)
            + min over X of g_0ᵀ x + Σ_k λ_kᵀ b_k.

This holds for every τ, and for a network whose units feed themselves as for a chain. So τ is a
proposal (lben/tightening/relaxation.py), and a proof is one evaluation of the right side. It is the
Lagrangian dual of the relaxation of every unit by the convex hull of its graph. Back-substitution
(CROWN) is one choice of τ, and α-CROWN chooses among a few. Branch and bound splits units: only
their intervals change.

Note [Rounding of the dual bound]
By Cauchy and Schwarz, g_j as computed is off by at most e_j = Σ_k ρ_k ‖W_kj‖ ‖λ_k‖, entry by entry,
with the column norms of W_kj and the relative error ρ_k of `AffineSystem.rate`. An error of e in g
moves the minimum of gσ(v) − τv by at most e max |σ|, and that of g_0ᵀx by at most e max |x|. All
other operations are sums of products, off by at most γ_N times the sum of their sizes, where N
exceeds the number of all terms. N is below 2²⁰, so that the roundings within an error are covered
by a factor of 1 + 2⁻²⁰. Products that underflow sum up to less than 2⁻⁹⁰⁰, since multipliers are at
least 2⁻⁵⁰⁰ or zero, and inputs and their normalisation lie within 2^±60. Squares underflow in a
norm, so 2⁻⁴⁰⁰ is added to it.

Reference:
    Salman, Yang, Zhang, Hsieh, Zhang (2019), "A convex relaxation barrier to tight robustness
    verification of neural networks", section 4; Zhang, Weng, Chen, Hsieh, Daniel (2018), "Efficient
    neural network robustness certification with general activation functions" (CROWN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lben.rigorous import UNIT, gamma_k
from lben.weights.activation import Activation
from lben.weights.affine_system import AffineSystem

InputNorm = Literal["l2", "linf"]
"""The norm that measures how far an input moves."""

_SLACK = 1 + 2.0**-20
_FLOOR = 2.0**-900
_NORM_FLOOR = 2.0**-400
_HUGE = 2.0**900
_LARGEST = 2.0**60
"""Of inputs, radii, and what the normalisation multiplies and divides by."""
_CELLS = 16
"""Cells of the grid on which a smooth activation is evaluated."""
_MOST_TERMS = 2**20
_PASSES = 4
"""Of the iteration for the multiplier of a ball."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InputRegion:
    """The sets of raw inputs ξ = center + Δ with ‖Δ‖₂ ≤ radius and lower ≤ Δ ≤ upper.

    Attributes:
        center: of each set.
        radius: in l2; infinite for a box alone.
        lower, upper: bounds of Δ, finite.

    Example:
        >>> import torch
        >>> from lben.certificates.relaxation import InputRegion
        >>> region = InputRegion.around(torch.tensor([[0.0, 0.5]]), 0.5, "l2", (0.0, 1.0))
        >>> region.reach().round(decimals=6).tolist()
        [[0.5, 0.5]]
        >>> region.minimum(torch.tensor([[1.0, 1.0]]).double()).round(decimals=6).tolist()
        [-0.5]
    """

    center: Float[Tensor, "batch p"]
    radius: Float[Tensor, " batch"]
    lower: Float[Tensor, "batch p"]
    upper: Float[Tensor, "batch p"]

    @classmethod
    def around(
        cls,
        x: Float[Tensor, "batch p"],
        radius: float | Float[Tensor, " batch"],
        norm: InputNorm,
        box: tuple[float, float] | None,
    ) -> InputRegion:
        """Return the balls around inputs, cut by a box.

        Args:
            x: raw inputs, float32 or float64.
            radius: one for all or one each, non-negative and finite.
            norm: of the balls.
            box: smallest and largest value of an input; None for no box.

        Raises:
            ValueError: if the norm is another, a radius is negative or not finite, or an input is
                not finite or outside of the box.
        """
        if norm not in ("l2", "linf"):
            raise ValueError(f"norm must be l2 or linf, got {norm!r}")
        center = x.detach().cpu().double()
        if not bool((center.abs() < _LARGEST).all()):
            raise ValueError(
                "x contains NaN, infinity or numbers above 2⁶⁰, and nothing is certified around it"
            )
        reach = torch.as_tensor(radius, dtype=torch.float64, device="cpu").detach()
        if reach.shape not in ((), (len(center),)):
            raise ValueError(
                f"radius must be one number or {len(center)}, got shape {tuple(reach.shape)}"
            )
        if not bool((reach >= 0).all() and (reach < _LARGEST).all()):
            raise ValueError(f"a radius must be at least 0 and below 2⁶⁰, got {radius}")
        # Wider by less than any rounding: the centre may then be rounded to normal numbers.
        reach = reach.expand(len(center)) * (1 + 2 * UNIT) + _NORM_FLOOR
        upper = reach[:, None].expand_as(center)
        lower = -upper
        if box is not None:
            low, high = map(float, box)
            if not (low < high and bool((center >= low).all() and (center <= high).all())):
                raise ValueError(
                    f"inputs must lie in the box [{low}, {high}], got values from "
                    f"{float(center.min()):g} to {float(center.max()):g}; give the box of raw "
                    "inputs, before normalisation, or box=None"
                )
            lower = torch.maximum(lower, _outwards(low - center, -1) - _NORM_FLOOR)
            upper = torch.minimum(upper, _outwards(high - center, 1) + _NORM_FLOOR)
        l2 = reach if norm == "l2" else torch.full_like(reach, math.inf)
        return cls(center=_flush(center), radius=l2, lower=lower.clone(), upper=upper.clone())

    def select(self, index: Tensor) -> InputRegion:
        """Return the sets at some indices of the batch."""
        return InputRegion(
            center=self.center[index], radius=self.radius[index], lower=self.lower[index],
            upper=self.upper[index],
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> InputRegion:
        """Return the sets in another dtype, for proposals."""
        return InputRegion(
            center=self.center.to(dtype), radius=self.radius.to(dtype),
            lower=self.lower.to(dtype), upper=self.upper.to(dtype),
        )  # fmt: skip

    def reach(self) -> Float[Tensor, "batch p"]:
        """Return the largest |Δ| of every input."""
        return torch.maximum(-self.lower, self.upper)

    def split(self, a: Float[Tensor, "batch p"]) -> Float[Tensor, "batch p"]:
        """Return which part w of the coefficients a the l2 ball should bound; see `minimum`.

        w = clip(a, −s·upper, −s·lower), where s > 0 solves ‖clip(a/s, −upper, −lower)‖₂ = radius.
        An iteration that removes the clipped entries decreases s to the solution from above.
        """
        with torch.no_grad():
            a = a.detach()
            ball = self.radius.isfinite()
            if not bool(ball.any()):
                return torch.zeros_like(a)
            radius = torch.where(ball, self.radius, 0.0)[:, None].clamp_min(1e-30)
            s = torch.linalg.vector_norm(a, dim=1, keepdim=True) / radius
            w = a.clamp(-s * self.upper, -s * self.lower)
            for _ in range(_PASSES):
                free = torch.where(w == a, a, 0.0).square().sum(1, keepdim=True)
                rest = radius**2 - (w.square().sum(1, keepdim=True) - free) / s.square()
                new = (free / rest).sqrt()
                s = torch.where((rest > 0) & (new < s), new, s)
                w = a.clamp(-s * self.upper, -s * self.lower)
            return torch.where(ball[:, None] & w.isfinite(), w, 0.0)

    @torch.no_grad()
    def find_minimizer(
        self, a: Float[Tensor, "batch p"]
    ) -> tuple[Float[Tensor, "batch p"], Float[Tensor, " batch"]]:
        """Return a Δ that makes aᵀΔ small, as computed, and the lower bound of `minimum`."""
        w = self.split(a)
        ball = torch.where(self.radius.isfinite(), self.radius, 0.0)
        norm = torch.linalg.vector_norm(w, dim=1)
        rest = a - w
        ends = torch.where(rest > 0, self.lower, self.upper)
        inner = w * (-ball / norm.clamp_min(1e-30))[:, None]
        return torch.where(rest == 0, inner, ends), (rest * ends).sum(1) - ball * norm

    def minimum(self, a: Float[Tensor, "batch p"]) -> Float[Tensor, " batch"]:
        """Return a lower bound of the least aᵀΔ, exact up to rounding for the best split of a.

        Let a = w + (a − w). Then aᵀΔ ≥ −radius ‖w‖₂ + Σ min over the box of (a − w)_k Δ_k, for
        every w. The gradient in a is the Δ that attains the bound.
        """
        point, bound = self.find_minimizer(a.detach())
        value = (a * point).sum(1)
        return value + (bound - value.detach())


def _outwards(t: Tensor, sign: int) -> Tensor:
    return torch.nextafter(t, torch.full_like(t, sign * math.inf))


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervals:
    """Intervals that hold the pre-activations of blocks for all inputs of a set.

    Attributes:
        lower, upper: by block.

    Example:
        >>> import torch
        >>> from lben.certificates.relaxation import Intervals
        >>> one = torch.ones(1, 2)
        >>> intervals = Intervals(lower={1: -one}, upper={1: one})
        >>> intervals.select(torch.tensor([0, 0])).lower[1].shape
        torch.Size([2, 2])
    """

    lower: Mapping[int, Float[Tensor, "batch _"]]
    upper: Mapping[int, Float[Tensor, "batch _"]]

    def select(self, index: Tensor) -> Intervals:
        """Return the intervals at some indices of the batch."""
        return Intervals(
            lower={j: t[index] for j, t in self.lower.items()},
            upper={j: t[index] for j, t in self.upper.items()},
        )

    def to(self, dtype: torch.dtype) -> Intervals:
        """Return the intervals in another dtype, for proposals."""
        return Intervals(
            lower={j: t.to(dtype) for j, t in self.lower.items()},
            upper={j: t.to(dtype) for j, t in self.upper.items()},
        )

    def with_block(self, block: int, lower: Tensor, upper: Tensor) -> Intervals:
        """Return the intervals with others for one block."""
        return Intervals(lower={**self.lower, block: lower}, upper={**self.upper, block: upper})

    def empty(self) -> Bool[Tensor, " batch"]:
        """Return where an interval is empty: no input is left there."""
        found = [(self.lower[j] > self.upper[j]).any(1) for j in self.lower]
        return torch.stack(found).any(0)


def multipliers_of(
    system: AffineSystem, level: int, target: Tensor, tau: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Return λ: τ, with the target added at its level."""
    lam = dict(tau)
    lam[level] = lam[level] + target if level in lam else target
    return lam


def unit_minimum(
    activation: Activation, g: Tensor, tau: Tensor, lower: Tensor, upper: Tensor
) -> Float[Tensor, "batch units"]:
    """Return the least gσ(v) − τv over [lower, upper] for each unit.

    For a piecewise linear σ the least value is at an end or at a knot. For a smooth one it is above
    the least value on a grid less curvature·|g|·δ²/8, where δ bounds the width of a cell.
    """

    def at(v: Tensor) -> Tensor:
        return g * activation(v) - tau * v

    least = torch.minimum(at(lower), at(upper))
    for knot in activation.knots:
        least = torch.minimum(least, at(torch.clamp(lower.new_tensor(knot), lower, upper)))
    if activation.curvature:
        width = upper - lower
        for i in range(1, _CELLS):
            node = torch.clamp(lower + width * (i / _CELLS), lower, upper)
            least = torch.minimum(least, at(node))
        least = least - g.abs() * _bound_sag(activation, lower, upper)
    return least


def _bound_sag(activation: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """Return how far a smooth σ may lie below the lines between its values on the grid."""
    size = torch.maximum(lower.abs(), upper.abs())
    cell = (upper - lower) * (_SLACK / _CELLS) + 16 * UNIT * size + 2.0**-120
    return cell.square() * (activation.curvature * _SLACK / 8)


def dual_value(
    system: AffineSystem,
    level: int,
    target: Float[Tensor, "batch units"],
    tau: Mapping[int, Float[Tensor, "batch _"]],
    intervals: Intervals,
    region: InputRegion,
) -> Float[Tensor, " batch"]:
    """Return the right side of Note [Dual bound], as computed and differentiable in τ.

    Args:
        system: the equations.
        level: m, of the target.
        target: t.
        tau: τ_j for each of `system.blocks(level)`.
        intervals: of these blocks.
        region: of the inputs.

    Returns:
        One number per member of the batch.
    """
    lam = multipliers_of(system, level, target, tau)
    a = system.pull(0, lam) / system.std
    value = (a * (region.center - system.mean)).sum(1) + region.minimum(a)
    for k, weights in lam.items():
        value = value + weights @ system.biases[k - 1]
    for j, slopes in tau.items():
        g = system.pull(j, lam)
        lower, upper = intervals.lower[j], intervals.upper[j]
        value = value + unit_minimum(system.activations[j - 1], g, slopes, lower, upper).sum(1)
    return value


@torch.no_grad()
def prove_lower_bounds(
    system: AffineSystem,
    level: int,
    target: Float[Tensor, "batch units"],
    tau: Mapping[int, Float[Tensor, "batch _"]],
    intervals: Intervals,
    region: InputRegion,
) -> Float[Tensor, " batch"]:
    """Prove a lower bound of tᵀv_m for all inputs of a set, from any τ.

    Args:
        system: the equations, in float64.
        level: m, of the target.
        target: t.
        tau: τ_j for each of `system.blocks(level)`: proposals.
        intervals: proved, of these blocks.
        region: of the inputs.

    Returns:
        The bound, with every rounding accounted for; −inf where none is proved.

    Raises:
        ValueError: if the system is not in float64, or has more than 2²⁰ numbers.

    Example:
        y = σ(1 + x) + σ(1 − x) is 2 on [−1, 1]. The bound by intervals, τ = 0, does not see that
        one unit rises while the other falls.

        >>> import numpy as np
        >>> import torch
        >>> from lben.certificates.relaxation import InputRegion, Intervals, prove_lower_bounds
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.affine_system import AffineSystem
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> hidden = AffineMap.of({0: np.array([[1.0], [-1.0]])}, np.array([1.0, 1.0]))
        >>> network = Network(
        ...     input_shape=(1,), blocks=(Block(affine=hidden, activation=RELU),),
        ...     output=AffineMap.of({1: np.array([[1.0, 1.0]])}, np.zeros(1)),
        ... )
        >>> system = AffineSystem.of_network(network)
        >>> zero, two = torch.zeros(1, 2).double(), torch.full((1, 2), 2.0).double()
        >>> region = InputRegion.around(zero[:, :1], 1.0, "linf", None)
        >>> intervals, one = Intervals(lower={1: zero}, upper={1: two}), torch.ones(1, 1).double()
        >>> for tau in (zero, two / 2):
        ...     bound = prove_lower_bounds(system, 2, one, {1: tau}, intervals, region)
        ...     print(round(1 + bound.item(), 9))
        1.0
        3.0
    """
    if system.dtype != torch.float64:
        raise ValueError(f"a proof runs in float64, the system is in {system.dtype}")
    if system.terms() >= _MOST_TERMS:
        raise ValueError(
            f"networks of at most {_MOST_TERMS} units and inputs are certified, this one has "
            f"{system.terms()}"
        )
    tau = {j: _flush(t.double()) for j, t in tau.items()}
    target = _flush(target)
    lam = multipliers_of(system, level, target, tau)
    norms = {k: torch.linalg.vector_norm(t, dim=1) * _SLACK + _NORM_FLOOR for k, t in lam.items()}
    a = system.pull(0, lam) / system.std
    shift, reach = region.center - system.mean, region.reach()
    w = region.split(a)
    ball = torch.where(region.radius.isfinite(), region.radius, 0.0)
    rest = a - w
    pulled = (rest * torch.where(rest > 0, region.lower, region.upper)).sum(1)
    outwards = ball * (torch.linalg.vector_norm(w, dim=1) + _NORM_FLOOR)
    value = (a * shift).sum(1) + pulled - outwards
    size = (a.abs() * (shift.abs() + reach)).sum(1) + outwards
    size = size + (rest.abs() * reach).sum(1)
    error = (_pull_error(system, 0, norms) / system.std * (shift.abs() + reach)).sum(1)
    for k, weights in lam.items():
        value = value + weights @ system.biases[k - 1]
        size = size + norms[k] * system.bias_sizes[k - 1]
        error = error + norms[k] * system.bias_sizes[k - 1] * system.rate(k)
    for j, slopes in tau.items():
        activation, lower, upper = system.activations[j - 1], intervals.lower[j], intervals.upper[j]
        g, off = system.pull(j, lam), _pull_error(system, j, norms)
        value = value + unit_minimum(activation, g, slopes, lower, upper).sum(1)
        output = bound_outputs(activation, lower, upper)
        inner = torch.maximum(lower.abs(), upper.abs())
        # λ = τ + t was rounded at the target's level: the exact τ is λ − t.
        size = size + (g.abs() * output).sum(1) + ((slopes.abs() + lam[j].abs()) * inner).sum(1)
        wrong = activation.relative_error * output + activation.absolute_error
        error = error + (off * output).sum(1) + ((g.abs() + off) * wrong).sum(1)
        if activation.curvature:
            size = size + (g.abs() * _bound_sag(activation, lower, upper)).sum(1)
    unit = gamma_k(system.terms() + 64)
    bound = value - (error + 2 * unit * (size + value.abs())) * _SLACK - _FLOOR
    sound = bound.isfinite() & (size < _HUGE) & (error < _HUGE)
    return torch.where(sound, bound, -math.inf)


def bound_outputs(activation: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """Return upper bounds of |σ(v)| and of its computed value over [lower, upper]."""
    ends = [activation(lower).abs(), activation(upper).abs()]
    size = torch.maximum(*ends)
    if activation.low < 0:
        steepest = max(abs(activation.low), abs(activation.high))
        size = ends[0] + steepest * (upper - lower)
    wrong = activation.relative_error * size + activation.absolute_error
    return (size + 2 * wrong) * _SLACK + _FLOOR


def _flush(t: Tensor) -> Tensor:
    """Return the numbers with small ones set to zero, so that none is denormal."""
    return torch.where(t.abs() < 2.0**-500, 0.0, t)


def _pull_error(system: AffineSystem, block: int, norms: Mapping[int, Tensor]) -> Tensor:
    """Return how far Σ_k W_kjᵀ λ_k may be off, entry by entry."""
    width = system.inputs if block == 0 else system.units(block)
    total = torch.full((len(next(iter(norms.values()))), width), _FLOOR, dtype=torch.float64)
    for k, norm in norms.items():
        columns = system.columns[k - 1].get(block)
        if columns is not None:
            total = total + system.rate(k) * norm[:, None] * columns
    return total


@torch.no_grad()
def prove_by_intervals(
    system: AffineSystem, level: int, intervals: Intervals, region: InputRegion
) -> tuple[Float[Tensor, "batch units"], Float[Tensor, "batch units"]]:
    """Prove bounds of v_k from the intervals of the blocks that it reads, for all units at once.

    Args:
        system: the equations, in float64.
        level: k.
        intervals: proved, of the blocks that the level reads.
        region: of the inputs.

    Returns:
        Lower and upper bounds of every unit, with every rounding accounted for.
    """
    middles, radii = {}, {}
    for j in system.reads(level):
        if j == 0:
            shift = region.center - system.mean
            low, high = (shift + region.lower) / system.std, (shift + region.upper) / system.std
            wrong = 8 * UNIT * (region.center.abs() + region.reach() + system.mean.abs())
            wrong = wrong / system.std
        else:
            activation, lower, upper = (
                system.activations[j - 1],
                intervals.lower[j],
                intervals.upper[j],
            )
            size = bound_outputs(activation, lower, upper)
            low, high = activation(lower), activation(upper)
            wrong = activation.relative_error * size + activation.absolute_error
            if activation.low < 0:
                low, high = -size, size
        middles[j] = (low + high) / 2
        radii[j] = ((high - low) / 2 + wrong) * _SLACK + 8 * UNIT * middles[j].abs() + _FLOOR
    v = system.push(level, middles)
    rate = system.rate(level)
    spread = system.push_sizes(level, {
        j: rate * middles[j].abs() + (1 + rate) * radii[j] for j in middles
    })  # fmt: skip
    spread = (spread + rate * system.bias_magnitudes[level - 1]) * _SLACK + _NORM_FLOOR
    lower, upper = v - spread, v + spread
    lower, upper = _outwards(lower, -1), _outwards(upper, 1)
    sound = lower.isfinite() & upper.isfinite() & (spread < _HUGE) & (v.abs() < _HUGE)
    return torch.where(sound, lower, -math.inf), torch.where(sound, upper, math.inf)
