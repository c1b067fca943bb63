"""Which multiplier shows the least bound where the slopes of σ are known to lie in [low, high]?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.cutting_planes import Facts, tighten_with_cutting_planes
from lben.tightening.interior_point import Program, minimise
from solvers.operators import batched

WIDTH = 2.0**-12
"""Of the narrowest interval of slopes: where there is none, Λ shows nothing of z̃ to start from."""


def widen(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return slopes in [0, 1] that contain those given, at least `WIDTH` apart."""
    low = torch.minimum(low, (high - WIDTH).clamp_min(0))
    return low, torch.maximum(high, low + WIDTH)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalProgram:
    """A batch of problems, each near an input of its own.

    Note [Slopes become [0, 1] again]
    With z = low·v + (high − low)·z̃ the new unknown has slopes in [0, 1] in v, so that the program
    is the global one of W̃ = (I − W low)⁻¹ W (high − low), Ũ = (I − W low)⁻¹ U and outputs
    C z + D x. With c = low + high − 2 low·high,
    c z̃(z̃ − v) ≥ z(z − v) for all z̃ and v: the discriminant of the difference is
    −4 low (1 − low) high (1 − high). So cΛ shows of z̃ what Λ shows of z: the global multiplier is a
    start, and a local bound never above the global one.

    Attributes:
        W, U, C, D: of the layers; only W is common to all.
        Lambda: a multiplier for which 2Λ − ΛW − WᵀΛ is positive definite.
        low, high: slopes, from `widen`.
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
        """What Λ is to z̃."""
        return self.Lambda * (self.low + self.high - 2 * self.low * self.high)

    def transform(self) -> Program:
        """Return the program of z̃."""
        identity = torch.eye(len(self.W), dtype=self.W.dtype, device=self.W.device)
        inner, _ = batched.inverse(identity - self._scaled)
        through, drive = inner @ (self.W * self.width[:, None, :]), inner @ self.U
        low = self.low[:, :, None]
        return Program(
            W=through, U=drive, C=self.C @ (low * through + torch.diag_embed(self.width)),
            D=self.D + self.C @ (low * drive),
        )  # fmt: skip

    @property
    def _scaled(self) -> Float[Tensor, "batch n n"]:
        return self.W * self.low[:, None, :]


def tighten_locally(
    problem: LocalProgram, *, gap: float = 1e-2, target: Float[Tensor, " batch"] | None = None
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"]]:
    """Propose the least γ and its Λ̃ for each of a batch of local problems.

    Args:
        problem: the batch.
        gap: relative accuracy of γ².
        target: stop at this γ, once it is reached or known to be out of reach.

    Returns:
        γ (the target where that is reached) and the multiplier of z̃.
    """
    squares = None if target is None else target.square()
    optimum = minimise(problem.transform(), problem.start, gap=gap, target=squares)
    gamma = optimum.tau[:, 0].sqrt()
    if target is not None:
        gamma = torch.where(gamma <= target, target, gamma)
    return gamma, optimum.multiplier / gamma[:, None]


def tighten_with_constraints(
    problem: LocalProgram,
    lines: Sequence[tuple[float, Float[Tensor, "batch n"]]],
    room: Float[Tensor, "batch 2 k"],
    target: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"], Float[Tensor, "batch m"]]:
    """Propose Λ̃ and weights of facts: z ≥ sv − o in every unit, and inputs with little room.

    Args:
        problem: the batch, with one output each, for inputs of at most unit length.
        lines: s and o.
        room: how far each input can fall and rise, infinite where that is not known.
        target: stop at this bound, once it is reached.

    Returns:
        The bound that is said to hold; the multiplier of z̃ for the output less the weighted facts;
        the weights, of every unit for line after line, then of inputs that fall and that rise.
    """
    program, batch = problem.transform(), len(target)
    slopes = [problem.low[:, :, None] - s for s, _ in lines]
    own = torch.diag_embed(problem.width)
    n, k = program.U.shape[1:]
    facts = Facts(
        of_inputs=_joined([s * program.U for s in slopes], program.U.new_zeros(batch, 0, k)),
        of_units=_joined([s * program.W + own for s in slopes], own.new_zeros(batch, 0, n)),
        offsets=_joined([o for _, o in lines], target.new_zeros(batch, 0)),
        room=room,
    )
    found = tighten_with_cutting_planes(program, facts, problem.start, target)
    return found.bound, found.multiplier / found.gamma[:, None], found.weights


def _joined(parts: list[Tensor], none: Tensor) -> Tensor:
    return torch.cat([none, *parts], dim=1)
