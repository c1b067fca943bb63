"""Which multipliers make a dual bound large? Back-substitution proposes them, ascent improves them.

The bound of Note [Dual bound] in lben/certificates/relaxation.py holds for every τ. Here

    τ = s ∘ g + h,

where the slope s of a unit is that of a line on the side of its graph that g asks for, and h = 0 at
first. On the side where gσ is concave the best line is the chord. On the other side every tangent
serves, and its slope is a parameter. h is the multiplier of the interval itself: branch and bound
splits intervals, and h is what β is in β-CROWN. For a chain g and τ follow from the last block to
the first. For an equilibrium they solve a linear system, once the signs of g are known.

Reference:
    Zhang, Weng, Chen, Hsieh, Daniel (2018), CROWN; Xu, Zhang, Wang, Wang, Jana, Lin, Hsieh (2021),
    "Fast and complete" (α-CROWN), section 3; Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter (2021),
    "β-CROWN", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates.relaxation import InputRegion, Intervals, dual_value, multipliers_of
from lben.weights.activation import Activation
from lben.weights.affine_system import AffineSystem, slope_at

_SIGNS = 6
"""Rounds in which the signs of g at an equilibrium are sought."""
_ALPHA_RATE, _SHIFT_RATE = 0.1, 0.005
_FASTER, _SLOWER, _LEAST, _MOST = 1.2, 0.8, 1e-3, 1e3
"""First steps of slopes, and of h in units of the mean |g|; the last steps, relative to these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Slopes of the lines that bound the units of a block over their intervals.

    Attributes:
        chord: from end to end.
        tangent: the slope proposed on the other side.
        least, most: the range of tangents.
        convex: whether σ lies below its chord.
    """

    chord: Float[Tensor, "batch units"]
    tangent: Float[Tensor, "batch units"]
    least: Float[Tensor, "batch units"]
    most: Float[Tensor, "batch units"]
    convex: Tensor

    @classmethod
    def of(cls, activation: Activation, lower: Tensor, upper: Tensor) -> Lines:
        """Return the lines of units whose pre-activations lie in [lower, upper].

        The tangent is the one at the middle: for ReLU the side with the smaller area.
        """
        width, middle = upper - lower, (lower + upper) / 2
        ends = activation(lower), activation(upper)
        tangent = slope_at(activation, middle)
        chord = torch.where(width > 1e-12, (ends[1] - ends[0]) / width.clamp_min(1e-12), tangent)
        left, right = slope_at(activation, lower), slope_at(activation, upper)
        # An end at a knot belongs to the side of the interval.
        left = torch.where(torch.isin(lower, lower.new_tensor(activation.knots)), tangent, left)
        right = torch.where(torch.isin(upper, upper.new_tensor(activation.knots)), tangent, right)
        return cls(
            chord=chord, tangent=tangent, least=torch.minimum(left, right),
            most=torch.maximum(left, right),
            convex=activation(middle) <= (ends[0] + ends[1]) / 2 + 1e-12 * width,
        )  # fmt: skip

    @classmethod
    def tangential(cls, slope: Tensor) -> Lines:
        """Return the lines of units that have one slope: back-substitution is then a gradient."""
        return cls(
            chord=slope, tangent=slope, least=slope, most=slope,
            convex=torch.ones_like(slope, dtype=torch.bool),
        )  # fmt: skip

    def slopes(self, g: Tensor, tangent: Tensor) -> Tensor:
        """Return s for units weighted by g."""
        return torch.where((g >= 0) == self.convex, tangent, self.chord)


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """What a dual bound is free to choose: tangents and h of each block.

    Attributes:
        tangents: slopes on the side without a chord, by block.
        shifts: h, by block.
        pace: of the next ascent, relative to its first steps.
    """

    tangents: Mapping[int, Float[Tensor, "batch units"]]
    shifts: Mapping[int, Float[Tensor, "batch units"]]
    pace: Float[Tensor, " batch"]

    @classmethod
    def of(cls, lines: Mapping[int, Lines]) -> Proposal:
        """Return the tangents at the middle, and h = 0."""
        count = max((len(line.tangent) for line in lines.values()), default=0)
        return cls(
            tangents={j: line.tangent for j, line in lines.items()},
            shifts={j: torch.zeros_like(line.tangent) for j, line in lines.items()},
            pace=torch.ones(count),
        )

    def select(self, index: Tensor) -> Proposal:
        """Return the proposals at some indices of the batch."""
        return Proposal(
            tangents={j: t[index] for j, t in self.tangents.items()},
            shifts={j: t[index] for j, t in self.shifts.items()},
            pace=self.pace[index],
        )

    def within(self, lines: Mapping[int, Lines]) -> Proposal:
        """Return the proposals with every tangent moved into the range of other lines."""
        return Proposal(
            tangents={j: t.clamp(lines[j].least, lines[j].most) for j, t in self.tangents.items()},
            shifts=self.shifts,
            pace=self.pace,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RelaxedBlock:
    """A block of units where a relaxation attains its bound, or nearly so.

    Attributes:
        g: weights of the units' outputs.
        v: pre-activations.
        z: outputs, on the lines of the relaxation.
    """

    g: Float[Tensor, "batch units"]
    v: Float[Tensor, "batch units"]
    z: Float[Tensor, "batch units"]


def propose_lines(system: AffineSystem, level: int, intervals: Intervals) -> dict[int, Lines]:
    """Return the lines of all units that a level may depend on."""
    return {
        j: Lines.of(system.activations[j - 1], intervals.lower[j], intervals.upper[j])
        for j in system.blocks(level)
    }


def back_substitute(
    system: AffineSystem,
    level: int,
    target: Float[Tensor, "batch units"],
    lines: Mapping[int, Lines],
    proposal: Proposal,
) -> dict[int, Tensor]:
    """Return τ by block for a target, differentiable in the proposal.

    Args:
        system: the equations.
        level: of the target.
        target: t.
        lines: of all blocks that the level depends on, see `propose_lines`.
        proposal: tangents and h.

    Returns:
        τ_j = s_j ∘ g_j + h_j.
    """
    if system.recurrent:
        return {1: _solve_adjoint(system, level, target, lines[1], proposal)}
    lam, tau = {level: target}, {}
    for j in reversed(system.blocks(level)):
        g = system.pull(j, lam)
        tau[j] = lines[j].slopes(g, proposal.tangents[j]) * g + proposal.shifts[j]
        lam[j] = tau[j]
    return dict(sorted(tau.items()))


def _solve_adjoint(
    system: AffineSystem, level: int, target: Tensor, lines: Lines, proposal: Proposal
) -> Tensor:
    """Return τ with λ = τ + t, g = Wᵀλ and τ = s(g) ∘ g + h."""
    W, tangent, shift = system.rows(1, 1), proposal.tangents[1], proposal.shifts[1]
    own = target if level == 1 else torch.zeros_like(shift)
    base = torch.zeros_like(shift) if level == 1 else system.pull(1, {level: target})
    eye = torch.eye(len(W), dtype=W.dtype)

    def solve(s: Tensor) -> Tensor:
        matrix = eye - s[:, :, None] * W.T
        right = s * base + shift + own
        return torch.linalg.solve(matrix, right[:, :, None])[:, :, 0]

    with torch.no_grad():
        s = lines.slopes(base + own @ W, tangent)
        for _ in range(_SIGNS):
            before, s = s, lines.slopes(solve(s) @ W + base, tangent)
            if torch.equal(before, s):
                break
        side = s == tangent
    return solve(torch.where(side, tangent, lines.chord)) - own


@torch.no_grad()
def find_relaxed_states(
    system: AffineSystem,
    level: int,
    target: Float[Tensor, "batch units"],
    lines: Mapping[int, Lines],
    proposal: Proposal,
    intervals: Intervals,
    region: InputRegion,
) -> dict[int, RelaxedBlock]:
    """Return where a relaxation attains its bound, or nearly so.

    The input is the one that makes g_0ᵀx least. Every unit lies on its chord where g asks for the
    chord, and on its graph elsewhere; at an equilibrium on its tangent.

    Args:
        system: the equations.
        level, target: of the bound.
        lines, proposal: as for `back_substitute`.
        intervals, region: of the bound.

    Returns:
        g, v and z by block.
    """
    tau = back_substitute(system, level, target, lines, proposal)
    lam = multipliers_of(system, level, target, tau)
    move, _ = region.find_minimizer(system.pull(0, lam) / system.std)
    states = {0: (region.center + move - system.mean) / system.std}
    blocks = {}
    for j, line in lines.items():
        activation, lower, upper = system.activations[j - 1], intervals.lower[j], intervals.upper[j]
        g = system.pull(j, lam)
        on_chord = (g >= 0) != line.convex
        start = activation(lower)
        if system.recurrent:
            middle = lower / 2 + upper / 2
            s = torch.where(on_chord, line.chord, proposal.tangents[j])
            at = torch.where(on_chord, lower, middle)
            states[j] = activation(at) - s * at
            W = system.rows(1, 1)
            matrix = torch.eye(len(W), dtype=W.dtype) - W * s[:, None, :]
            v = torch.linalg.solve(matrix, system.push(1, states)[:, :, None])[:, :, 0]
        else:
            v = system.push(j, states)
        v = v.clamp(lower, upper)
        z = torch.where(on_chord, start + line.chord * (v - lower), activation(v))
        states[j] = z
        blocks[j] = RelaxedBlock(g=g, v=v, z=z)
    return blocks


def ascend(
    system: AffineSystem,
    level: int,
    target: Float[Tensor, "batch units"],
    intervals: Intervals,
    region: InputRegion,
    start: Proposal,
    *,
    steps: int,
    goal: Float[Tensor, " batch"] | float = float("inf"),
) -> tuple[Proposal, Float[Tensor, " batch"]]:
    """Improve proposals by steps of Adam on the dual bound, each member of the batch by itself.

    Args:
        system: the equations, in any dtype.
        level: of the target.
        target: t.
        intervals, region: of the bound.
        start: of the ascent.
        steps: how many.
        goal: stop when every bound is above it.

    Returns:
        The best proposals met, and their bounds as computed.
    """
    lines = propose_lines(system, level, intervals)
    tangents = {j: t.clone().requires_grad_() for j, t in start.tangents.items()}
    shifts = {j: t.clone() for j, t in start.shifts.items()}
    with torch.no_grad():
        first_tau = back_substitute(system, level, target, lines, start)
        full = multipliers_of(system, level, target, first_tau)
        units = {
            j: system.pull(j, full).abs().mean(1, keepdim=True).clamp_min(1e-9) for j in shifts
        }
    scaled = {j: (shifts[j] / units[j]).requires_grad_() for j in shifts}
    parameters = [*tangents.values(), *scaled.values()]
    rates = [_ALPHA_RATE] * len(tangents) + [_SHIFT_RATE] * len(scaled)
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    best, pace = start, start.pace
    best_value = torch.full((len(target),), -torch.inf, dtype=target.dtype)
    for step in range(1, steps + 2):
        now = Proposal(
            tangents=dict(tangents), shifts={j: scaled[j] * units[j] for j in scaled}, pace=pace
        )
        tau = back_substitute(system, level, target, lines, now)
        value = dual_value(system, level, target, tau, intervals, region)
        with torch.no_grad():
            better = value > best_value
            if step > 1:
                pace = (pace * torch.where(better, _FASTER, _SLOWER)).clamp(_LEAST, _MOST)
            best_value = torch.where(better, value, best_value)
            best = _choose(better, now, best)
        if step > steps or bool((best_value > goal).all()):
            break
        gradients = torch.autograd.grad(value.sum(), parameters)
        with torch.no_grad():
            here = pace[:, None]
            for p, rate, gradient, m, q in zip(
                parameters, rates, gradients, first, second, strict=True
            ):
                m.mul_(0.9).add_(gradient, alpha=0.1)
                q.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
                size = (q / (1 - 0.99**step)).sqrt() + 1e-12
                p.add_(here * m / (1 - 0.9**step) / size, alpha=rate)
            for j, t in tangents.items():
                t.clamp_(lines[j].least, lines[j].most)
    return replace(best, pace=pace), best_value


def _choose(better: Tensor, now: Proposal, best: Proposal) -> Proposal:
    where = better[:, None]
    return Proposal(
        tangents={
            j: torch.where(where, t.detach(), best.tangents[j]) for j, t in now.tangents.items()
        },
        shifts={j: torch.where(where, t.detach(), best.shifts[j]) for j, t in now.shifts.items()},
        pace=now.pace,
    )
