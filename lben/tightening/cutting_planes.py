"""Which bound is the least where increments are known to satisfy linear constraints?

Increments (x, z) from a sample satisfy two kinds of linear constraints: a convex σ lies above
lines, and a pixel stays in [0, 1]. There are hundreds of them, so a program gets sums of them. Each
round finds the increment at which the output falls most, takes the constraints that it violates,
weights each by the violation, and adds their weighted sum to the next program as one constraint: a
cutting plane (Kelley 1960). Of all sums with weights of that norm this increment violates it most.

Note [Offsets]
A constraint F(x, z) ≥ −o with o > 0 has a price. If the output less wᵀF falls by at most γ within
the unit ball, then the output falls by at most γ + wᵀo. The program minimises τ = γ²; so γ is
replaced by its tangent from above at γ̂, γ ≤ τ/(2γ̂) + γ̂/2. The objective is then τ + 2γ̂wᵀo, and
γ + wᵀo ≤ t holds once the objective is at most 2γ̂t − γ̂². Each round takes γ̂ from the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.layer_program import LayerOptimum, LayerProgram, minimise_bound


@dataclass(frozen=True, kw_only=True, eq=False)
class Constraints:
    """Linear constraints that all increments (x, z) from a sample with ‖x‖₂ ≤ 1 satisfy.

        input_rows x + unit_rows z ≥ −offsets,   −box_slack[0] ≤ x ≤ box_slack[1].

    m = l + 2p counts them: the l rows, then p inputs that fall and p that rise.

    Attributes:
        input_rows: the coefficients of x.
        unit_rows: the coefficients of z.
        offsets: o ≥ 0.
        box_slack: how far each input can fall and rise; infinite where that is not known.
    """

    input_rows: Float[Tensor, "batch l p"]
    unit_rows: Float[Tensor, "batch l n"]
    offsets: Float[Tensor, "batch l"]
    box_slack: Float[Tensor, "batch 2 p"]

    def select(self, index: Tensor) -> Constraints:
        """Return the constraints of the samples at some indices of the batch."""
        return Constraints(**{name: t[index] for name, t in vars(self).items()})

    def measure_violations(self, x: Tensor, z: Tensor) -> Float[Tensor, "batch 2 m"]:
        """Return by how much an increment violates every constraint.

        Returns:
            Two rows per sample, each of unit l2 norm (or zero): violations of the constraints with
            rows, then violations of the box slack.
        """
        value = (self.input_rows @ x[:, :, None] + self.unit_rows @ z[:, :, None])[:, :, 0]
        units = torch.relu(-value - self.offsets)
        inputs = torch.relu(torch.stack([-x, x], dim=1) - self.box_slack).flatten(1)
        rows = torch.stack(
            [
                torch.cat([units, torch.zeros_like(inputs)], dim=1),
                torch.cat([torch.zeros_like(units), inputs], dim=1),
            ],
            dim=1,
        )
        return rows / rows.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)

    def combine(
        self, weights: Float[Tensor, "batch k m"]
    ) -> tuple[Float[Tensor, "batch k N"], Float[Tensor, "batch k"]]:
        """Return weighted sums of the constraints.

        Args:
            weights: k rows of m weights ≥ 0.

        Returns:
            k rows of N = p + n coefficients of (x, z), and the offset of each.
        """
        unit_rows, input_rows = weights.split(
            [self.unit_rows.shape[1], 2 * self.box_slack.shape[2]], dim=2
        )
        fall, rise = input_rows.unflatten(2, (2, -1)).unbind(2)
        rows = torch.cat(
            [unit_rows @ self.input_rows + fall - rise, unit_rows @ self.unit_rows], dim=2
        )
        offsets = torch.cat([self.offsets, self.box_slack.flatten(1)], dim=1)[:, None]
        return rows, torch.where(weights > 0, weights * offsets, 0.0).sum(2)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstrainedOptimum:
    """A proposal for each of a batch of programs with constraints.

    Attributes:
        bound: by how much the output falls at most within the unit ball, γ + wᵀo.
        gamma: γ, the bound of the output less the weighted constraints.
        multiplier: γΛ, which shows γ.
        weights: w ≥ 0 of the m constraints.
    """

    bound: Float[Tensor, " batch"]
    gamma: Float[Tensor, " batch"]
    multiplier: Float[Tensor, "batch n"]
    weights: Float[Tensor, "batch m"]


def tighten_with_cutting_planes(
    program: LayerProgram,
    constraints: Constraints,
    multiplier: Float[Tensor, "batch n"],
    target: Float[Tensor, " batch"],
    *,
    gap: float = 2e-2,
    rounds: int = 8,
) -> ConstrainedOptimum:
    """Propose a bound, a multiplier and weights of the constraints for each of a batch of programs.

    Args:
        program: the batch, with one output (q = 1) each.
        constraints: on its inputs and units.
        multiplier: Λ up to a factor, for which 2Λ − ΛW − WᵀΛ is positive definite.
        target: a bound; a program leaves once its bound is at most the target.
        gap: relative accuracy of each program's objective, for the cutting planes that it has.
        rounds: how many programs are solved one after the other; each has two planes more.

    Returns:
        The best proposal of all rounds.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Reference:
        Kelley (1960), "The cutting-plane method for solving convex programs".
    """
    batch, _, p = program.U.shape
    m = constraints.unit_rows.shape[1] + 2 * p
    planes = program.U.new_zeros(batch, 0, m)
    best = ConstrainedOptimum(
        bound=torch.full_like(target, torch.inf), gamma=target.clone(),
        multiplier=multiplier.clone(), weights=program.U.new_zeros(batch, m),
    )  # fmt: skip
    active = torch.arange(batch, device=target.device)
    for _ in range(rounds):
        part, known, goal = program.select(active), constraints.select(active), target[active]
        around = best.gamma[active].minimum(goal)
        rows, offsets = known.combine(planes)
        found, worst = _solve(part, rows, offsets, best.multiplier[active], gap, goal, around)
        gamma = found.tau[:, 0].sqrt()
        bound = gamma + (found.constraints * offsets).sum(1)
        better = bound < best.bound[active]
        index = active[better]
        best.bound[index], best.gamma[index] = bound[better], gamma[better]
        best.multiplier[index] = found.multiplier[better]
        best.weights[index] = (found.constraints[:, None] @ planes)[better, 0]
        violated = known.measure_violations(worst[:, :p], worst[:, p:])
        left = (bound > goal) & (violated != 0).any(2).any(1)
        if not bool(left.any()):
            break
        planes, active = torch.cat([planes, violated], dim=1)[left], active[left]
    return best


def _solve(
    program: LayerProgram,
    sums: Tensor,
    offsets: Tensor,
    multiplier: Tensor,
    gap: float,
    target: Tensor,
    around: Tensor,
) -> tuple[LayerOptimum, Float[Tensor, "batch N"]]:
    """Solve programs with some cutting planes, and find the increments at which outputs fall most.

    Args:
        sums: the planes, as rows over (x, z).
        offsets: of the planes.
        around: γ̂ of Note [Offsets].
    """
    p = program.U.shape[2]
    # The rows of U, D and of the constraints span all that matters of the inputs.
    rows = torch.cat([program.D, program.U, sums[:, :, :p]], dim=1)
    basis = torch.linalg.qr(rows.mT)[0]
    small = replace(
        program, U=program.U @ basis, D=program.D @ basis,
        constraints=torch.cat([sums[:, :, :p] @ basis, sums[:, :, p:]], dim=2),
        prices=2 * around[:, None] * offsets,
    )  # fmt: skip
    found = minimise_bound(small, multiplier, gap=gap, target=around * (2 * target - around))
    worst = small.find_worst_direction(found)
    k = basis.shape[2]
    length = worst[:, :k].norm(dim=1, keepdim=True).clamp_min(torch.finfo(worst.dtype).tiny)
    worst = worst / length
    inputs = (basis @ worst[:, :k, None])[:, :, 0]
    return found, torch.cat([inputs, worst[:, k:]], dim=1)
