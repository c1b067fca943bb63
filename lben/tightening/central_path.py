"""How is a batch of semidefinite programs followed along the central path?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

_REDUCTION = 0.1
"""Of the barrier's weight, once a point is near the central path."""
_NEAR = 0.5
"""Newton decrement below which a point counts as near the central path."""


class Barrier(Protocol):
    """Programs that minimise a linear objective, positive in the cone, each with its barrier."""

    @property
    def parameter(self) -> int:
        """The barrier's parameter: at weight μ the objective is at most this many μ too large."""

    def objective(self, point: Float[Tensor, "batch m"]) -> Float[Tensor, " batch"]:
        """Return what is minimised."""

    def select(self, index: Tensor) -> Self:
        """Return some programs of the batch."""

    def newton(
        self, point: Float[Tensor, "batch m"], weight: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch m"], Float[Tensor, " batch"]]:
        """Return Newton's direction for the objective ÷ μ plus the barrier, and the decrement.

        A decrement that is not finite ends the program where it stands.
        """

    def value(
        self, point: Float[Tensor, "batch m"], weight: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Return the objective ÷ μ plus the barrier; infinite where it is not feasible."""


@dataclass(frozen=True, kw_only=True, eq=False)
class End:
    """Where the path was left: strictly feasible, at most `gap` (relative) above the minimum."""

    point: Float[Tensor, "batch m"]
    gap: Float[Tensor, " batch"]
    steps: int


def follow(
    program: Barrier,
    start: Float[Tensor, "batch m"],
    *,
    gap: float,
    target: Float[Tensor, " batch"] | None = None,
    max_steps: int = 200,
) -> End:
    """Follow the central path from a strictly feasible point.

    Each program of the batch has its own barrier weight and step length, and leaves when its gap
    is closed.

    Args:
        program: the batch.
        start: a point for each.
        gap: relative accuracy of the objective.
        target: a value of the objective; a program leaves once it is reached, or known to be out of
            reach.
        max_steps: of Newton's method.
    """
    point = start.clone()
    active = torch.arange(len(point), device=point.device)
    weight = program.objective(point) / program.parameter
    reached = torch.full_like(weight, torch.inf)
    steps = 0
    while len(active) and steps < max_steps:
        steps += 1
        part = program if len(active) == len(point) else program.select(active)
        here, mu = point[active], weight[active]
        direction, decrement = part.newton(here, mu)
        length = _length(part, here, mu, direction, decrement)
        point[active] = here + length[:, None] * direction
        near = decrement * (1 - length).clamp_min(decrement) < _NEAR
        value = part.objective(point[active])
        closed = mu * program.parameter * 1.5 / value
        reached[active] = torch.where(near, closed, reached[active])
        weight[active] = torch.where(near, mu * _REDUCTION, mu)
        left = (reached[active] > gap) & decrement.isfinite()
        if target is not None:
            goal = target[active]
            left &= (value > goal) & (value * (1 - reached[active]) <= goal)
        active = active[left]
    return End(point=point, gap=reached, steps=steps)


def log_barrier(matrix: Float[Tensor, "batch N N"]) -> Float[Tensor, " batch"]:
    """Return −log det, infinite where the matrix is not positive definite."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    value = -2 * root.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.where((failed == 0) & value.isfinite(), value, torch.inf)


def is_solved(
    hessian: Float[Tensor, "batch m m"], gradient: Float[Tensor, "batch m"]
) -> Float[Tensor, "batch m"]:
    """Return −H⁻¹g, by Cholesky with a unit diagonal; NaN where rounding made H indefinite."""
    scale = hessian.diagonal(dim1=1, dim2=2).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(scale[:, :, None] * hessian * scale[:, None, :])
    direction = scale * torch.cholesky_solve(-(scale * gradient)[:, :, None], factor)[:, :, 0]
    return torch.where((failed == 0)[:, None], direction, torch.nan)


def has_ended(direction: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the direction and its decrement, zero and infinite where it is not finite."""
    finite = torch.isfinite(direction).all(1)
    direction = torch.where(finite[:, None], direction, 0.0)
    square = torch.where(finite, -(gradient * direction).sum(1), torch.inf)
    return direction, square.clamp_min(0).sqrt()


def _length(
    part: Barrier, point: Tensor, weight: Tensor, direction: Tensor, decrement: Tensor
) -> Tensor:
    """Return a step length that lowers the value, or 0 where none does.

    The damped step 1/(1 + δ), with δ the decrement, lowers it by δ − log(1 + δ) (Nesterov and
    Nemirovskii 1994). Longer ones are tried first, and halved for as long as that lowers it: a
    point next to the boundary is feasible, and a bad start of the next step.
    """
    safe = 1 / (1 + decrement)
    wanted = part.value(point, weight) - 0.5 * (decrement - torch.log1p(decrement))
    length = torch.where(decrement < 0.25, torch.ones_like(safe), (6 * safe).clamp_max(1.0))
    least, best = torch.full_like(safe, torch.inf), torch.zeros_like(safe)
    while bool((length > 1e-6).all()):
        value = part.value(point + length[:, None] * direction, weight)
        lower = (value < least) & (value <= wanted)
        least, best = torch.where(lower, value, least), torch.where(lower, length, best)
        if bool((~lower & (best > 0)).all()):
            break
        length = 0.5 * length
    return 0.9 * best + 0.1 * safe.minimum(best)
