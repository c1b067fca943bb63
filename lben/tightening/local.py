"""Which multiplier shows the least bound where the slopes of σ are known to lie in [low, high]?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.semidefinite import Program, minimise

WIDTH = 2.0**-12
"""Of the narrowest interval of slopes: a narrower one needs a multiplier too large to prove."""


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return slopes in [0, 1] that contain those given, at least `WIDTH` apart."""
    low = torch.minimum(low, (high - WIDTH).clamp_min(0))
    return low, torch.maximum(high, low + WIDTH)


def tighten_locally(
    W: Float[Tensor, "n n"],
    U: Float[Tensor, "batch n k"],
    C: Float[Tensor, "batch q n"],
    D: Float[Tensor, "batch q k"],
    Lambda: Float[Tensor, " n"],
    slopes: tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n"]],
    *,
    gap: float = 1e-2,
    target: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n"]]:
    """Propose the least γ and its Λ for each of a batch of local problems.

    Note [Slopes become [0, 1] again]
    With z = low·v + (high − low)·z̃ the new unknown has slopes in [0, 1] in v, so that the program
    is the global one of W̃ = (I − W low)⁻¹ W (high − low), Ũ = (I − W low)⁻¹ U and outputs
    C z + D x; Λ of the one is Λ̃ / (high − low)² of the other. With c = low + high − 2 low·high,
    c z̃(z̃ − v) ≥ z(z − v) for all z̃ and v: the discriminant of the difference is
    −4 low (1 − low) high (1 − high). So cΛ shows of z̃ what Λ shows of z: the global multiplier is a
    start, and a local bound never above the global one.

    Args:
        W, U, C, D: of the layers; only W is common to all.
        Lambda: a multiplier for which 2Λ − ΛW − WᵀΛ is positive definite.
        slopes: low and high, from `widened`.
        gap: relative accuracy of γ².
        target: stop at this γ, once it is reached or known to be out of reach.

    Returns:
        γ (the target where that is reached) and Λ.
    """
    low, high = slopes
    width = high - low
    n = W.shape[0]
    identity = torch.eye(n, dtype=W.dtype)
    inner = torch.linalg.inv(identity - W * low[:, None, :])
    through = inner @ (W * width[:, None, :])
    drive = inner @ U
    program = Program(
        W=through,
        U=drive,
        C=C @ (low[:, :, None] * through + torch.diag_embed(width)),
        D=D + C @ (low[:, :, None] * drive),
    )
    squares = None if target is None else target.square()
    start = Lambda * (low + high - 2 * low * high)
    optimum = minimise(program, start, gap=gap, target=squares)
    gamma = optimum.tau[:, 0].sqrt()
    if target is not None:
        gamma = torch.where(gamma <= target, target, gamma)
    return gamma, optimum.multiplier / (gamma[:, None] * width.square())
