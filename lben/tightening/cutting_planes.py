"""Which bound is the least where increments are known to stay on one side of some planes?

Two kinds of facts about increments from a sample: a convex σ lies above lines, and a pixel stays in
[0, 1]. There are hundreds, so they come in as sums: where the direction that is worst so far breaks
some, the sum of those, each weighted by how far it is broken, becomes a fact of the next program
(Kelley's cutting planes: of all such sums the one that this direction breaks most).

Note [Offsets]
A fact F(x, z) ≥ −o with o > 0 has a price: outputs that fall by at most γ − wᵀF are outputs that
fall by at most γ + wᵀo, within the unit ball. The program minimises τ = γ², so γ is replaced by its
tangent above, τ/(2γ̂) + γ̂/2: for the objective τ + 2γ̂wᵀo the bound γ + wᵀo ≤ t is reached at
2γ̂t − γ̂². Each round has γ̂ from the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.interior_point import Optimum, Program, minimise


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What increments (x, z) from a sample are known to satisfy, for ‖x‖ ≤ 1.

    Attributes:
        of_inputs, of_units: l × p and l × n.
        offsets: l numbers o ≥ 0: of_inputs x + of_units z ≥ −o.
        room: 2 × p: −room[0] ≤ x ≤ room[1], infinite where nothing is known.
    """

    of_inputs: Float[Tensor, "batch l p"]
    of_units: Float[Tensor, "batch l n"]
    offsets: Float[Tensor, "batch l"]
    room: Float[Tensor, "batch 2 p"]

    def select(self, index: Tensor) -> Facts:
        """Return those of some of the batch."""
        return Facts(**{name: t[index] for name, t in vars(self).items()})

    def broken(self, x: Tensor, z: Tensor) -> Float[Tensor, "batch 2 m"]:
        """Return how far every fact is broken, those of units and of inputs in a row each."""
        value = (self.of_inputs @ x[:, :, None] + self.of_units @ z[:, :, None])[:, :, 0]
        units = torch.relu(-value - self.offsets)
        inputs = torch.relu(torch.stack([-x, x], dim=1) - self.room).flatten(1)
        rows = torch.stack(
            [
                torch.cat([units, torch.zeros_like(inputs)], dim=1),
                torch.cat([torch.zeros_like(units), inputs], dim=1),
            ],
            dim=1,
        )
        return rows / rows.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)

    def sums(
        self, weights: Float[Tensor, "batch k m"]
    ) -> tuple[Float[Tensor, "batch k N"], Float[Tensor, "batch k"]]:
        """Return weighted sums of facts, as rows over (x, z), and their offsets."""
        of_units, of_inputs = weights.split([self.of_units.shape[1], 2 * self.room.shape[2]], dim=2)
        fall, rise = of_inputs.unflatten(2, (2, -1)).unbind(2)
        rows = torch.cat([of_units @ self.of_inputs + fall - rise, of_units @ self.of_units], dim=2)
        offsets = torch.cat([self.offsets, self.room.flatten(1)], dim=1)[:, None]
        return rows, torch.where(weights > 0, weights * offsets, 0.0).sum(2)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstrainedOptimum:
    """The bound of the output, √τ of what is left without the facts, multiplier and weights."""

    bound: Float[Tensor, " batch"]
    gamma: Float[Tensor, " batch"]
    multiplier: Float[Tensor, "batch n"]
    weights: Float[Tensor, "batch m"]


def tighten_with_cutting_planes(
    program: Program,
    facts: Facts,
    multiplier: Float[Tensor, "batch n"],
    target: Float[Tensor, " batch"],
    *,
    gap: float = 2e-2,
    rounds: int = 8,
) -> ConstrainedOptimum:
    """Propose a bound, a multiplier and weights of the facts for each of a batch of programs.

    Args:
        program: with one output each.
        facts: of its inputs and units.
        multiplier: λ up to a factor, for which 2Λ − ΛW − WᵀΛ is positive definite.
        target: a bound; a program leaves once it is reached.
        gap: relative accuracy of the objective, between the sums of facts that are there.
        rounds: programs that are solved, one after the other, with two sums more each.
    """
    batch, _, p = program.U.shape
    m = facts.of_units.shape[1] + 2 * p
    cuts = program.U.new_zeros(batch, 0, m)
    best = ConstrainedOptimum(
        bound=torch.full_like(target, torch.inf), gamma=target.clone(),
        multiplier=multiplier.clone(), weights=program.U.new_zeros(batch, m),
    )  # fmt: skip
    active = torch.arange(batch, device=target.device)
    for _ in range(rounds):
        part, known, goal = program.select(active), facts.select(active), target[active]
        around = best.gamma[active].minimum(goal)
        rows, offsets = known.sums(cuts)
        found, worst = _solve(part, rows, offsets, best.multiplier[active], gap, goal, around)
        gamma = found.tau[:, 0].sqrt()
        bound = gamma + (found.facts * offsets).sum(1)
        better = bound < best.bound[active]
        index = active[better]
        best.bound[index], best.gamma[index] = bound[better], gamma[better]
        best.multiplier[index] = found.multiplier[better]
        best.weights[index] = (found.facts[:, None] @ cuts)[better, 0]
        broken = known.broken(worst[:, :p], worst[:, p:])
        left = (bound > goal) & (broken != 0).any(2).any(1)
        if not bool(left.any()):
            break
        cuts, active = torch.cat([cuts, broken], dim=1)[left], active[left]
    return best


def _solve(
    program: Program,
    sums: Tensor,
    offsets: Tensor,
    multiplier: Tensor,
    gap: float,
    target: Tensor,
    around: Tensor,
) -> tuple[Optimum, Float[Tensor, "batch N"]]:
    """Solve programs with some facts; also return the increments at which each output falls most.

    Args:
        around: γ̂ of Note [Offsets].
    """
    p = program.U.shape[2]
    # The rows of U, D and of the facts span all that matters of the inputs.
    rows = torch.cat([program.D, program.U, sums[:, :, :p]], dim=1)
    basis = torch.linalg.qr(rows.mT)[0]
    small = replace(
        program, U=program.U @ basis, D=program.D @ basis,
        facts=torch.cat([sums[:, :, :p] @ basis, sums[:, :, p:]], dim=2),
        prices=2 * around[:, None] * offsets,
    )  # fmt: skip
    found = minimise(small, multiplier, gap=gap, target=around * (2 * target - around))
    point = torch.cat([found.tau, found.multiplier, found.facts], dim=1)
    worst = small.worst_direction(point)
    k = basis.shape[2]
    length = worst[:, :k].norm(dim=1, keepdim=True).clamp_min(torch.finfo(worst.dtype).tiny)
    worst = worst / length
    inputs = (basis @ worst[:, :k, None])[:, :, 0]
    return found, torch.cat([inputs, worst[:, k:]], dim=1)
