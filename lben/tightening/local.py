"""Which multiplier shows the least bound where the slopes of σ are known to lie in [low, high]?

The slopes are those of chords from one operating point: Δzᵢ/Δvᵢ. Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.cutting_planes import Constraints, tighten_with_cutting_planes
from lben.tightening.layer_program import LayerProgram, minimise_bound
from solvers.operators import batched

WIDTH = 2.0**-12
"""Least width of an interval of slopes: at width 0 the multiplier of z̃ has no start."""


def widen_slope_bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope bounds in [0, 1] around those given, with high − low of at least `WIDTH`."""
    low = torch.minimum(low, (high - WIDTH).clamp_min(0))
    return low, torch.maximum(high, low + WIDTH)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalProgram:
    """A batch of problems, each around an operating point of its own.

    Note [Slopes become [0, 1] again]
    Define z̃ by z = low·v + (high − low)·z̃. As a function of v it has slopes in [0, 1]. So the local
    problem is the global one of the weights W̃ = (I − W low)⁻¹ W (high − low) and
    Ũ = (I − W low)⁻¹ U, with the outputs Cz + Dx. Let c = low + high − 2 low·high. Then
    c z̃(z̃ − v) ≥ z(z − v) for all z̃ and v, as the discriminant of the difference is
    −4 low (1 − low) high (1 − high). So the multiplier cΛ of z̃ shows every bound that Λ shows of z:
    it is a start, and no local bound is above the global one.

    Attributes:
        W: of the layer, common to all problems.
        U, C, D: of each problem, with k inputs and q outputs.
        Lambda: a multiplier for which 2Λ − ΛW − WᵀΛ is positive definite.
        low, high: slope bounds, from `widen_slope_bounds`.
    """

    W: Float[Tensor, "n n"]
    U: Float[Tensor, "batch n k"]
    C: Float[Tensor, "batch q n"]
    D: Float[Tensor, "batch q k"]
    Lambda: Float[Tensor, " n"]
    low: Float[Tensor, "batch n"]
    high: Float[Tensor, "batch n"]

    @property
    def width(self) -> Float[Tensor, "batch n"]:
        """high − low."""
        return self.high - self.low

    @property
    def start(self) -> Float[Tensor, "batch n"]:
        """The multiplier of z̃ from which a program starts: (low + high − 2 low·high)Λ."""
        return self.Lambda * (self.low + self.high - 2 * self.low * self.high)

    def transform(self) -> LayerProgram:
        """Return the global program of z̃."""
        identity = torch.eye(len(self.W), dtype=self.W.dtype, device=self.W.device)
        inner, _ = batched.inverse(identity - self._scaled)
        through, drive = inner @ (self.W * self.width[:, None, :]), inner @ self.U
        low = self.low[:, :, None]
        return LayerProgram(
            W=through, U=drive, C=self.C @ (low * through + torch.diag_embed(self.width)),
            D=self.D + self.C @ (low * drive),
        )  # fmt: skip

    @property
    def _scaled(self) -> Float[Tensor, "batch n n"]:
        return self.W * self.low[:, None, :]


def tighten_locally(
    problem: LocalProgram, *, gap: float = 1e-2, target: Float[Tensor, " batch"] | None = None
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"]]:
    """Propose the least γ and its multiplier for each of a batch of local problems.

    Args:
        problem: the batch.
        gap: relative accuracy of γ².
        target: a problem also ends once its γ is at most the target, or known to be above.

    Returns:
        γ, with ‖Δy‖₂ ≤ γ‖Δx‖₂ (the target itself where γ is below it); the multiplier of z̃.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Example:
        A unit with slopes in [0, ½] bounds y = z by half of what slopes in [0, 1] do.

        >>> import torch
        >>> from lben.tightening.local import LocalProgram, tighten_locally, widen_slope_bounds
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> low, high = widen_slope_bounds(0 * one, 0.5 * one)
        >>> problem = LocalProgram(
        ...     W=0 * one, U=one[None], C=one[None], D=0 * one[None], Lambda=one[0],
        ...     low=low, high=high,
        ... )
        >>> gamma, _ = tighten_locally(problem)
        >>> round(gamma.item(), 2)
        0.5
    """
    squares = None if target is None else target.square()
    optimum = minimise_bound(problem.transform(), problem.start, gap=gap, target=squares)
    gamma = optimum.tau[:, 0].sqrt()
    if target is not None:
        gamma = torch.where(gamma <= target, target, gamma)
    return gamma, optimum.multiplier / gamma[:, None]


def tighten_with_constraints(
    problem: LocalProgram,
    lines: Sequence[tuple[float, Float[Tensor, "batch n"]]],
    box_slack: Float[Tensor, "batch 2 k"],
    target: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"], Float[Tensor, "batch m"]]:
    """Propose a bound from slope bounds, the constraints Δz ≥ sΔv − o, and the box slack of inputs.

    Args:
        problem: the batch, with one output (q = 1) each, for increments with ‖Δx‖₂ ≤ 1.
        lines: pairs of a slope s and offsets o, one offset per unit.
        box_slack: how far each input can fall and rise; infinite where that is not known.
        target: a problem ends once its bound is at most the target.

    Returns:
        The bound of how far the output falls; the multiplier of z̃ for the output less the weighted
        constraints; the m weights: of every unit for line after line, then of the inputs that fall
        and of the inputs that rise.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    program, batch = problem.transform(), len(target)
    slopes = [problem.low[:, :, None] - s for s, _ in lines]
    own = torch.diag_embed(problem.width)
    n, k = program.U.shape[1:]
    constraints = Constraints(
        input_rows=_stack_rows([s * program.U for s in slopes], program.U.new_zeros(batch, 0, k)),
        unit_rows=_stack_rows([s * program.W + own for s in slopes], own.new_zeros(batch, 0, n)),
        offsets=_stack_rows([o for _, o in lines], target.new_zeros(batch, 0)),
        box_slack=box_slack,
    )
    found = tighten_with_cutting_planes(program, constraints, problem.start, target)
    return found.bound, found.multiplier / found.gamma[:, None], found.weights


def _stack_rows(parts: list[Tensor], none: Tensor) -> Tensor:
    return torch.cat([none, *parts], dim=1)
