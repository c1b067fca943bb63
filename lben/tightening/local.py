"""Which multiplier shows the least bound where the slopes of σ are known to lie in [low, high]?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.semidefinite import Program, minimise
from lben.tightening.sided import Facts, tighten_sided

WIDTH = 2.0**-12
"""Of the narrowest interval of slopes: a narrower one needs a multiplier too large to prove."""


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return slopes in [0, 1] that contain those given, at least `WIDTH` apart."""
    low = torch.minimum(low, (high - WIDTH).clamp_min(0))
    return low, torch.maximum(high, low + WIDTH)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalProgram:
    """A batch of problems, each near an input of its own.

    Note [Slopes become [0, 1] again]
    With z = low·v + (high − low)·z̃ the new unknown has slopes in [0, 1] in v, so that the program
    is the global one of W̃ = (I − W low)⁻¹ W (high − low), Ũ = (I − W low)⁻¹ U and outputs
    C z + D x; Λ of the one is Λ̃ / (high − low)² of the other. With c = low + high − 2 low·high,
    c z̃(z̃ − v) ≥ z(z − v) for all z̃ and v: the discriminant of the difference is
    −4 low (1 − low) high (1 − high). So cΛ shows of z̃ what Λ shows of z: the global multiplier is a
    start, and a local bound never above the global one.

    Attributes:
        W, U, C, D: of the layers; only W is common to all.
        Lambda: a multiplier for which 2Λ − ΛW − WᵀΛ is positive definite.
        low, high: slopes, from `widened`.
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

    def transformed(self) -> Program:
        """Return the program of z̃."""
        identity = torch.eye(len(self.W), dtype=self.W.dtype)
        # One by one: LU of a batch of matrices above 149 rows fails with threads in PyTorch 2.5 to
        # 2.13 (its issue 142815).
        inner = torch.stack([torch.linalg.inv(identity - scaled) for scaled in self._scaled])
        through, drive = inner @ (self.W * self.width[:, None, :]), inner @ self.U
        low = self.low[:, :, None]
        return Program(
            W=through, U=drive, C=self.C @ (low * through + torch.diag_embed(self.width)),
            D=self.D + self.C @ (low * drive),
        )  # fmt: skip

    @property
    def _scaled(self) -> Float[Tensor, "batch n n"]:
        return self.W * self.low[:, None, :]

    def multiplier(self, of_other: Tensor, gamma: Tensor) -> Float[Tensor, "batch n"]:
        """Return Λ from what the program of z̃ found for γΛ̃."""
        return of_other / (gamma[:, None] * self.width.square())


def tighten_locally(
    problem: LocalProgram, *, gap: float = 1e-2, target: Float[Tensor, " batch"] | None = None
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"]]:
    """Propose the least γ and its Λ for each of a batch of local problems.

    Args:
        problem: the batch.
        gap: relative accuracy of γ².
        target: stop at this γ, once it is reached or known to be out of reach.

    Returns:
        γ (the target where that is reached) and Λ.
    """
    squares = None if target is None else target.square()
    optimum = minimise(problem.transformed(), problem.start, gap=gap, target=squares)
    gamma = optimum.tau[:, 0].sqrt()
    if target is not None:
        gamma = torch.where(gamma <= target, target, gamma)
    return gamma, problem.multiplier(optimum.multiplier, gamma)


def tighten_with_facts(
    problem: LocalProgram,
    tangents: Float[Tensor, "batch n"],
    faces: Float[Tensor, "batch k"],
    target: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"], Float[Tensor, "batch n+k"]]:
    """Propose γ, Λ and weights of facts: z ≥ sv in every unit, and inputs that stay on their side.

    Args:
        problem: the batch, with one output each.
        tangents: s, NaN where none is known.
        faces: 1 for inputs that cannot fall, −1 for those that cannot rise, 0 for the others.
        target: stop at this γ, once it is reached.

    Returns:
        γ (the target where that is reached), Λ, and the weights of tangents and of faces: the bound
        is that of the output less the weighted facts.
    """
    program = problem.transformed()
    less = torch.nan_to_num(problem.low - tangents)[:, :, None]
    known = (~tangents.isnan()).to(less.dtype)
    facts = Facts(
        of_inputs=less * program.U,
        of_units=less * program.W + torch.diag_embed(known * problem.width),
        faces=faces,
    )
    found = tighten_sided(program, facts, problem.start, target.square())
    gamma = found.tau.sqrt()
    gamma = torch.where(gamma <= target, target, gamma)
    return gamma, problem.multiplier(found.multiplier, gamma), found.weights
