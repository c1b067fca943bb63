"""Which bound is the least where increments are known to stay on one side of some planes?

Two kinds of facts about increments from a sample: σ lies above its tangent at the sample, where it
is convex, and a pixel that is 0 cannot fall, one that is 1 cannot rise. There are hundreds, so they
come in as sums: where the direction that is worst so far breaks some, the sum of those, each
weighted by how far it is broken, becomes a fact of the next program (Kelley's cutting planes: of
all such sums the one that this direction breaks most).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.semidefinite import Optimum, Program, minimise


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What increments (x, z) from a sample are known to satisfy.

    Attributes:
        of_inputs, of_units: n × p and n × n: of_inputs x + of_units z ≥ 0, zero rows for nothing.
        faces: p: 1 where xₖ ≥ 0, −1 where xₖ ≤ 0, 0 where neither is known.
    """

    of_inputs: Float[Tensor, "batch n p"]
    of_units: Float[Tensor, "batch n n"]
    faces: Float[Tensor, "batch p"]

    def select(self, index: Tensor) -> Facts:
        """Return those of some of the batch."""
        return Facts(**{name: t[index] for name, t in vars(self).items()})

    def broken(self, x: Tensor, z: Tensor) -> Float[Tensor, "batch 2 m"]:
        """Return how far every fact is broken, those of units and of faces in a row each."""
        value = (self.of_inputs @ x[:, :, None] + self.of_units @ z[:, :, None])[:, :, 0]
        units, faces = torch.relu(-value), torch.relu(-self.faces * x)
        rows = torch.stack(
            [
                torch.cat([units, torch.zeros_like(faces)], dim=1),
                torch.cat([torch.zeros_like(units), faces], dim=1),
            ],
            dim=1,
        )
        return rows / rows.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)

    def sums(self, weights: Float[Tensor, "batch k m"]) -> Float[Tensor, "batch k N"]:
        """Return weighted sums of facts, as rows over (x, z)."""
        n = self.of_units.shape[1]
        units, faces = weights[:, :, :n], weights[:, :, n:]
        x = units @ self.of_inputs + faces * self.faces[:, None]
        return torch.cat([x, units @ self.of_units], dim=2)


@dataclass(frozen=True, kw_only=True, eq=False)
class SidedOptimum:
    """The square of the bound, the multiplier, and the weight of every fact."""

    tau: Float[Tensor, " batch"]
    multiplier: Float[Tensor, "batch n"]
    weights: Float[Tensor, "batch m"]


def tighten_sided(
    program: Program,
    facts: Facts,
    multiplier: Float[Tensor, "batch n"],
    target: Float[Tensor, " batch"],
    *,
    gap: float = 2e-2,
    rounds: int = 8,
) -> SidedOptimum:
    """Propose a bound, a multiplier and weights of the facts for each of a batch of programs.

    Args:
        program: with one output each.
        facts: of its inputs and units.
        multiplier: λ up to a factor, for which 2Λ − ΛW − WᵀΛ is positive definite.
        target: a value of τ; a program leaves once it is reached.
        gap: relative accuracy of τ, between the sums of facts that are there.
        rounds: programs that are solved, one after the other, with two sums more each.
    """
    batch, n, p = program.U.shape
    cuts = program.U.new_zeros(batch, 0, n + p)
    tau, lam = torch.full_like(target, torch.inf), multiplier.clone()
    weights, active = program.U.new_zeros(batch, n + p), torch.arange(batch)
    for _ in range(rounds):
        part, known, goal = program.select(active), facts.select(active), target[active]
        found, worst = _solve(part, known.sums(cuts), lam[active], gap, goal)
        better = found.tau[:, 0] < tau[active]
        index = active[better]
        tau[index], lam[index] = found.tau[better, 0], found.multiplier[better]
        weights[index] = (found.facts[:, None] @ cuts)[better, 0]
        broken = known.broken(worst[:, :p], worst[:, p:])
        left = (found.tau[:, 0] > goal) & (broken != 0).any(2).any(1)
        if not bool(left.any()):
            break
        cuts, active = torch.cat([cuts, broken], dim=1)[left], active[left]
    return SidedOptimum(tau=tau, multiplier=lam, weights=weights)


def _solve(
    program: Program, sums: Tensor, multiplier: Tensor, gap: float, target: Tensor
) -> tuple[Optimum, Float[Tensor, "batch N"]]:
    """Solve programs with some facts; also return the direction in which each output falls most."""
    p = program.U.shape[2]
    # The rows of U, D and of the facts span all that matters of the inputs.
    rows = torch.cat([program.D, program.U, sums[:, :, :p]], dim=1)
    basis = torch.linalg.qr(rows.mT)[0]
    small = replace(
        program, U=program.U @ basis, D=program.D @ basis,
        facts=torch.cat([sums[:, :, :p] @ basis, sums[:, :, p:]], dim=2),
    )  # fmt: skip
    found = minimise(small, multiplier, gap=gap, target=target)
    point = torch.cat([found.tau, found.multiplier, found.facts], dim=1)
    worst = small.worst_direction(point)
    k = basis.shape[2]
    inputs = (basis @ worst[:, :k, None])[:, :, 0]
    return found, torch.cat([inputs, worst[:, k:]], dim=1)
