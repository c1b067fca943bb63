"""How is a batch of semidefinite programs followed along the central path?

By Newton's method on objective/μ plus the barrier. Near the minimiser for one μ, the next μ is a
tenth of it (Nesterov and Nemirovskii 1994).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

_REDUCTION = 0.1
"""Factor of the barrier's weight μ, once a point is near the central path."""
_NEAR = 0.5
"""Newton decrement below which a point counts as near the central path."""


class Barrier(Protocol):
    """Programs that minimise a linear objective over a cone, each with the barrier of its cone.

    The objective is positive in the cone. A point is a row of numbers per program.
    """

    @property
    def parameter(self) -> int:
        """The barrier's parameter ν: on the path at μ the objective is at most νμ too large."""

    def evaluate_objective(self, point: Float[Tensor, "batch m"]) -> Float[Tensor, " batch"]:
        """Return the objective of each program at a point."""

    def select(self, index: Tensor) -> Self:
        """Return the programs at some indices of the batch."""

    def compute_newton_step(
        self, point: Float[Tensor, "batch m"], weight: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch m"], Float[Tensor, " batch"]]:
        """Return Newton's direction for objective/μ plus barrier, and the Newton decrement.

        A decrement that is not finite ends the program at its present point.
        """

    def evaluate_barrier(
        self, point: Float[Tensor, "batch m"], weight: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Return objective/μ plus barrier; infinite at points outside the cone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PathEnd:
    """The last point on the path of each program: strictly feasible.

    Attributes:
        point: the variables of each program.
        gap: relative bound of objective − minimum; infinite where the path was never reached.
        steps: Newton steps of the batch.
    """

    point: Float[Tensor, "batch m"]
    gap: Float[Tensor, " batch"]
    steps: int


def follow_central_path(
    program: Barrier,
    start: Float[Tensor, "batch m"],
    *,
    gap: float,
    target: Float[Tensor, " batch"] | None = None,
    max_steps: int = 200,
) -> PathEnd:
    """Follow the central path of a batch of programs from strictly feasible points.

    Each program has its own barrier weight μ and step length. It leaves the batch when its gap is
    at most `gap`.

    Args:
        program: the batch.
        start: a strictly feasible point of each program.
        gap: relative accuracy of the objective.
        target: a value of the objective; a program also leaves once its objective is at most the
            target, or once its minimum is known to be above.
        max_steps: bound of the number of Newton steps.

    Returns:
        The last point of each program, with its gap.

    Reference:
        Nesterov and Nemirovskii (1994), chapter 2; Boyd and Vandenberghe (2004), section 11.3.
    """
    point = start.clone()
    active = torch.arange(len(point), device=point.device)
    weight = program.evaluate_objective(point) / program.parameter
    reached = torch.full_like(weight, torch.inf)
    steps = 0
    while len(active) and steps < max_steps:
        steps += 1
        part = program if len(active) == len(point) else program.select(active)
        here, mu = point[active], weight[active]
        direction, decrement = part.compute_newton_step(here, mu)
        length = _length(part, here, mu, direction, decrement)
        point[active] = here + length[:, None] * direction
        near = decrement * (1 - length).clamp_min(decrement) < _NEAR
        value = part.evaluate_objective(point[active])
        closed = mu * program.parameter * 1.5 / value
        reached[active] = torch.where(near, closed, reached[active])
        weight[active] = torch.where(near, mu * _REDUCTION, mu)
        left = (reached[active] > gap) & decrement.isfinite()
        if target is not None:
            goal = target[active]
            left &= (value > goal) & (value * (1 - reached[active]) <= goal)
        active = active[left]
    return PathEnd(point=point, gap=reached, steps=steps)


def evaluate_log_det_barrier(matrix: Float[Tensor, "batch N N"]) -> Float[Tensor, " batch"]:
    """Return −log det of each matrix; infinite where it is not positive definite."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    value = -2 * root.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.where((failed == 0) & value.isfinite(), value, torch.inf)


def solve_newton_system(
    hessian: Float[Tensor, "batch m m"], gradient: Float[Tensor, "batch m"]
) -> Float[Tensor, "batch m"]:
    """Return −H⁻¹g, from a Cholesky factor of H scaled to unit diagonal.

    Returns:
        The direction; NaN where rounding made H indefinite.
    """
    scale = hessian.diagonal(dim1=1, dim2=2).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(scale[:, :, None] * hessian * scale[:, None, :])
    direction = scale * torch.cholesky_solve(-(scale * gradient)[:, :, None], factor)[:, :, 0]
    return torch.where((failed == 0)[:, None], direction, torch.nan)


def measure_decrement(direction: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return a direction d and its Newton decrement √(−gᵀd).

    Where d is not finite the direction returned is 0 and the decrement infinite.
    """
    finite = torch.isfinite(direction).all(1)
    direction = torch.where(finite[:, None], direction, 0.0)
    square = torch.where(finite, -(gradient * direction).sum(1), torch.inf)
    return direction, square.clamp_min(0).sqrt()


def _length(
    part: Barrier, point: Tensor, weight: Tensor, direction: Tensor, decrement: Tensor
) -> Tensor:
    """Return a step length that lowers objective/μ plus barrier, or 0 where none does.

    With Newton decrement δ, the damped step 1/(1 + δ) lowers it by at least δ − log(1 + δ)
    (Nesterov and Nemirovskii 1994). Longer steps are tried first and halved while halving lowers it
    further: a point next to the boundary of the cone is feasible, but a bad start of the next step.
    """
    safe = 1 / (1 + decrement)
    wanted = part.evaluate_barrier(point, weight) - 0.5 * (decrement - torch.log1p(decrement))
    length = torch.where(decrement < 0.25, torch.ones_like(safe), (6 * safe).clamp_max(1.0))
    least, best = torch.full_like(safe, torch.inf), torch.zeros_like(safe)
    while bool((length > 1e-6).all()):
        value = part.evaluate_barrier(point + length[:, None] * direction, weight)
        lower = (value < least) & (value <= wanted)
        least, best = torch.where(lower, value, least), torch.where(lower, length, best)
        if bool((~lower & (best > 0)).all()):
            break
        length = 0.5 * length
    return 0.9 * best + 0.1 * safe.minimum(best)
