"""Is an output positive on a whole set of inputs? Where one bound is not enough, units are split.

A split divides a set of inputs into two: pre-activation v_i is at most s on one part and at least s
on the other. Each part is proved like the whole, with another interval for one unit. If all
parts are proved, the whole is. ReLU is split at its knot, and is linear on either part; a smooth
activation is split in the middle of its interval.

Reference:
    Bunel, Turkaslan, Torr, Kohli, Kumar (2018), "A unified view of piecewise linear neural network
    verification"; De Palma, Bunel, Desmaison, Dvijotham, Kohli, Torr, Kumar (2021), "Improved
    branch and bound for neural network verification via Lagrangian decomposition" (candidates are
    tried before one is taken).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates.relaxation import InputRegion, Intervals, dual_value
from lben.radii.ranges import prove_bounds
from lben.tightening.relaxation import Proposal, back_substitute, find_relaxed_states, propose_lines
from lben.weights.activation import Activation
from lben.weights.affine_system import AffineSystem

_BATCH = 64
"""Parts that are split at a time."""
_CANDIDATES = 4
"""Splits that are tried before one is taken."""
_STEPS, _MORE_STEPS = 30, 8
"""Of ascent for the whole, and for a part, which starts where the whole ended."""
_GOAL = 1e-4
"""Ascent ends above it: a proof is a little below a proposal."""
_SECOND = 0.1
"""How much the better part of a split counts beside the worse one."""
_SHARE = 0.2
"""How much the largest distance of a unit's lines to its graph counts, beside the one attained."""
_TIE = 1e-9
"""How much the width of an interval counts, where no unit is worth a split."""
_PARTS = 2**15
"""No more parts are kept waiting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Parts of a set of inputs that are still to be proved.

    Attributes:
        target: which output of the list.
        intervals: of all pre-activations on each part.
        proposal: where ascent starts.
    """

    target: Tensor
    intervals: Intervals
    proposal: Proposal

    def __len__(self) -> int:
        return len(self.target)

    def select(self, index: Tensor) -> Parts:
        """Return some of the parts."""
        return Parts(
            target=self.target[index], intervals=self.intervals.select(index),
            proposal=self.proposal.select(index),
        )  # fmt: skip

    def append(self, other: Parts) -> Parts:
        """Return these parts and others."""
        ours, theirs = self.intervals, other.intervals
        return Parts(
            target=torch.cat([self.target, other.target]),
            intervals=Intervals(
                lower=_cat(ours.lower, theirs.lower), upper=_cat(ours.upper, theirs.upper)
            ),
            proposal=Proposal(
                tangents=_cat(self.proposal.tangents, other.proposal.tangents),
                shifts=_cat(self.proposal.shifts, other.proposal.shifts),
                pace=torch.cat([self.proposal.pace, other.proposal.pace]),
            ),
        )


def _cat(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {j: torch.cat([t, second[j]]) for j, t in first.items()}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of the outputs on a set.

    Attributes:
        margin: the least proved bound over all outputs and parts; −inf if one is not proved.
        parts: how many were proved.
    """

    margin: float
    parts: int


def prove_positive(
    system: AffineSystem,
    targets: Float[Tensor, "many q"],
    intervals: Intervals,
    region: InputRegion,
    *,
    seconds: float,
) -> Verdict:
    """Prove that tᵀy > 0 for some vectors t and all inputs of one set, by branch and bound.

    Args:
        system: the equations, in float64.
        targets: t, one a row.
        intervals: proved, of all blocks, a batch of one.
        region: one set.
        seconds: for the search.

    Returns:
        The proved margin, positive if all outputs are.
    """
    end = time.monotonic() + seconds
    every = torch.arange(len(targets))
    whole = intervals.select(torch.zeros_like(every))
    lines = propose_lines(system.single, system.output, whole.to(torch.float32))
    parts = Parts(target=every, intervals=whole, proposal=Proposal.of(lines))
    margin, proved, open_ = math.inf, 0, parts.select(every[:0])
    steps = _STEPS
    while True:
        bounds = prove_bounds(
            system, system.output, targets[parts.target], parts.intervals,
            region.select(torch.zeros_like(parts.target)), steps=steps, start=parts.proposal,
            goal=_GOAL,
        )  # fmt: skip
        done = bounds.value > 0
        margin = min([margin, *bounds.value[done].tolist()])
        proved += int(done.sum())
        left = replace(parts, proposal=bounds.proposal).select((~done).nonzero()[:, 0])
        steps = _MORE_STEPS
        open_ = open_.append(left)
        if not len(open_):
            break
        if time.monotonic() > end or len(open_) > _PARTS:
            return Verdict(margin=-math.inf, parts=proved)
        index = torch.arange(len(open_))
        parts = _split(system, targets, open_.select(index[-_BATCH:]), region)
        open_ = open_.select(index[:-_BATCH])
    return Verdict(margin=margin, parts=proved)


def _split(system: AffineSystem, targets: Tensor, parts: Parts, region: InputRegion) -> Parts:
    """Return two parts for each, split where that promises most."""
    scores = _rate_units(system, targets, parts, region)
    best = scores.topk(min(_CANDIDATES, scores.shape[1]), dim=1).indices
    gains = [_rate_split(system, targets, _halve(system, parts, u), region) for u in best.T]
    choice = torch.stack(gains, dim=1).argmax(1, keepdim=True)
    return _halve(system, parts, best.gather(1, choice)[:, 0])


@torch.no_grad()
def _rate_units(
    system: AffineSystem, targets: Tensor, parts: Parts, region: InputRegion
) -> Float[Tensor, "parts units"]:
    """Return what each unit contributes to the gap between the relaxation and the network.

    It is |g| times the distance of the unit's state in the relaxation to its graph, plus a share of
    the largest distance that is possible.
    """
    single, intervals = system.single, parts.intervals.to(torch.float32)
    goals, level = targets[parts.target].float(), system.output
    lines = propose_lines(single, level, intervals)
    blocks = find_relaxed_states(
        single, level, goals, lines, parts.proposal.within(lines), intervals,
        region.select(torch.zeros_like(parts.target)).to(torch.float32),
    )  # fmt: skip
    scores = []
    for j, block in blocks.items():
        activation, lower, upper = (
            single.activations[j - 1], intervals.lower[j], intervals.upper[j],
        )  # fmt: skip
        at = _choose_split(activation, lower, upper)
        most = activation(lower) + lines[j].chord * (at - lower) - activation(at)
        gap = (block.z - activation(block.v)).abs() + _SHARE * most.abs()
        scores.append(block.g.abs() * gap + _TIE * (upper - lower))
    return torch.cat(scores, dim=1)


@torch.no_grad()
def _rate_split(
    system: AffineSystem, targets: Tensor, halves: Parts, region: InputRegion
) -> Float[Tensor, " parts"]:
    """Return how large the bounds of both halves are, before ascent."""
    single, intervals = system.single, halves.intervals.to(torch.float32)
    goals, level = targets[halves.target].float(), system.output
    lines = propose_lines(single, level, intervals)
    tau = back_substitute(single, level, goals, lines, halves.proposal.within(lines))
    around = region.select(torch.zeros_like(halves.target)).to(torch.float32)
    value = dual_value(single, level, goals, tau, intervals, around)
    low, high = value.clamp_max(0.0).view(2, -1).sort(dim=0).values
    return low + _SECOND * high


def _choose_split(activation: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """Return where intervals are split: at a knot inside, else in the middle."""
    at = lower / 2 + upper / 2
    for knot in activation.knots:
        at = torch.where((lower < knot) & (upper > knot), knot, at)
    return at


def _halve(system: AffineSystem, parts: Parts, choice: Tensor) -> Parts:
    """Return the lower parts and then the upper ones, each split at one unit of all blocks."""
    lower, upper = ({j: torch.cat([t, t]) for j, t in side.items()} for side in (
        parts.intervals.lower, parts.intervals.upper
    ))  # fmt: skip
    count, offset = len(parts), 0
    for j in system.blocks(system.output):
        here = ((choice >= offset) & (choice < offset + system.units(j))).nonzero()[:, 0]
        unit = choice[here] - offset
        at = _choose_split(system.activations[j - 1], lower[j][here, unit], upper[j][here, unit])
        upper[j][here, unit] = at
        lower[j][here + count, unit] = at
        offset += system.units(j)
    both = torch.cat([torch.arange(count)] * 2)
    return Parts(
        target=parts.target[both], intervals=Intervals(lower=lower, upper=upper),
        proposal=parts.proposal.select(both),
    )  # fmt: skip
