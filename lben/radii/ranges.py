"""Between which values does every pre-activation stay? Proposals are proved, block after block.

A proof of one unit's range needs the ranges of the units that it depends on. In a feed-forward
network these are earlier units. At an equilibrium all units depend on each other: the ranges start
from `StateBound` and shrink round after round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates.relaxation import (
    InputRegion,
    Intervals,
    prove_by_intervals,
    prove_lower_bounds,
)
from lben.certificates.states import StateBound
from lben.tightening.relaxation import Proposal, ascend, back_substitute, propose_lines
from lben.weights.affine_system import AffineSystem

_NUMBERS = 2**22
"""Of the largest tensor of a batch."""
_ROUNDS = 12
"""Of ranges at an equilibrium."""
_PROGRESS = 0.99
"""Rounds end when the mean width shrinks by less."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """Proved lower bounds, and the proposals behind them.

    Attributes:
        value: one per member of the batch.
        proposal: in float32.
    """

    value: Float[Tensor, " batch"]
    proposal: Proposal


def prove_bounds(
    system: AffineSystem,
    level: int,
    target: Float[Tensor, "batch units"],
    intervals: Intervals,
    region: InputRegion,
    *,
    steps: int,
    goal: float = math.inf,
    start: Proposal | None = None,
) -> Bounds:
    """Return proved lower bounds of tᵀv_m, from proposals that some steps of ascent improve.

    Args:
        system: the equations, in float64.
        level: m.
        target: t.
        intervals: proved, of the blocks that the level depends on.
        region: of the inputs.
        steps: of ascent, in float32.
        goal: ascent ends once all bounds are above it.
        start: of the ascent; back-substitution when omitted.

    Returns:
        One bound per member of the batch.
    """
    single, rough = system.single, intervals.to(torch.float32)
    goals = target.float()
    lines = propose_lines(single, level, rough)
    proposal = Proposal.of(lines) if start is None else start.within(lines)
    if steps and proposal.tangents:
        proposal, _ = ascend(
            single, level, goals, rough, region.to(torch.float32), proposal, steps=steps, goal=goal
        )
    with torch.no_grad():
        tau = back_substitute(single, level, goals, lines, proposal)
    return Bounds(
        value=prove_lower_bounds(system, level, target, tau, intervals, region), proposal=proposal
    )


def prove_ranges(
    system: AffineSystem,
    region: InputRegion,
    *,
    steps: int = 0,
    known: Intervals | None = None,
) -> Intervals:
    """Return proved intervals of all pre-activations for all inputs of each set.

    Args:
        system: the equations, in float64.
        region: of the inputs.
        steps: of ascent for every unit whose range is worth it, beyond back-substitution.
        known: proved intervals of every block, to be narrowed.

    Returns:
        The intervals of every block.

    Raises:
        CertificateError: if nothing is known of an equilibrium, see `StateBound`.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from lben.certificates.relaxation import InputRegion
        >>> from lben.radii.ranges import prove_ranges
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.affine_system import AffineSystem
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> one = AffineMap.of({0: np.array([[1.0], [-1.0]])}, np.array([1.0, 1.0]))
        >>> two = AffineMap.of({1: np.array([[1.0, 1.0]])}, np.zeros(1))
        >>> network = Network(
        ...     input_shape=(1,), output=two,
        ...     blocks=(Block(affine=one, activation=RELU), Block(affine=two, activation=RELU)),
        ... )  # the second block is 2 on [−1, 1]
        >>> system = AffineSystem.of_network(network)
        >>> region = InputRegion.around(torch.zeros(1, 1), 1.0, "linf", None)
        >>> ranges = prove_ranges(system, region)
        >>> ranges.lower[2].round(decimals=6).tolist(), ranges.upper[2].round(decimals=6).tolist()
        ([[2.0]], [[2.0]])
    """
    if system.recurrent:
        if known is None:
            known = StateBound(system).prove(region, system.evaluate(region.center)[0])
        return _refine_equilibrium(system, known, region, steps=steps)
    intervals = Intervals(lower={}, upper={})
    for level in range(1, system.output):
        if known is None:
            lower, upper = prove_by_intervals(system, level, intervals, region)
        else:
            lower, upper = known.lower[level], known.upper[level]
        if known is None or not set(system.reads(level)) <= {0}:
            intervals = _refine(system, level, intervals, region, lower, upper, steps)
        else:  # without units below, nothing can be better
            intervals = intervals.with_block(level, lower, upper)
    return intervals


def _refine_equilibrium(
    system: AffineSystem, intervals: Intervals, region: InputRegion, *, steps: int
) -> Intervals:
    """Return narrower intervals of the units of an equilibrium, from proved ones."""
    for _ in range(_ROUNDS):
        before = intervals.upper[1] - intervals.lower[1]
        lower, upper = intervals.lower[1], intervals.upper[1]
        intervals = _refine(system, 1, intervals, region, lower, upper, steps)
        width = intervals.upper[1] - intervals.lower[1]
        if not bool((width.mean(1) < _PROGRESS * before.mean(1)).any()):
            break
    return intervals


def _refine(
    system: AffineSystem,
    level: int,
    intervals: Intervals,
    region: InputRegion,
    lower: Tensor,
    upper: Tensor,
    steps: int,
) -> Intervals:
    """Return the intervals with those of one block, narrowed where that helps a relaxation."""
    activation = system.activations[level - 1]
    inside = torch.full_like(lower, bool(activation.curvature), dtype=torch.bool)
    for knot in activation.knots:
        inside |= (lower < knot) & (upper > knot)
    lower, upper = lower.clone(), upper.clone()
    image, unit = inside.nonzero(as_tuple=True)
    widest = max(system.inputs, *(system.units(k) for k in range(1, system.output + 1)))
    if system.recurrent:
        widest = max(widest, system.units(1) ** 2)
    for sign, side in ((1.0, lower), (-1.0, upper)):
        for part in torch.arange(len(image)).split(max(1, _NUMBERS // widest)):
            where = image[part], unit[part]
            target = torch.zeros(len(part), system.units(level), dtype=torch.float64)
            target[torch.arange(len(part)), where[1]] = sign
            found = prove_bounds(
                system,
                level,
                target,
                intervals.select(where[0]),
                region.select(where[0]),
                steps=steps,
            ).value
            near = torch.maximum if sign > 0 else torch.minimum
            side[where] = near(side[where], sign * found)
    return intervals.with_block(level, lower, upper)
