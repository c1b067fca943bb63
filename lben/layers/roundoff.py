"""How are bounds of roundoff formed, so that they hold where numbers vanish or overflow?

In float64, for sums as Note [Rounding of a product] of solvers/operators/base.py describes them: in
any order, accumulators starting anywhere in the sum, with or without fused multiply-adds. In
float64 cuDNN's convolutions are such sums too; its methods by Winograd and by the Fourier transform
are for shorter types.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


def underflow(terms: int) -> float:
    """Return what a sum of so many products can lose to underflow, also where it is flushed."""
    return 2 * (terms + 4) * _TINY


def norms_above(values: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
    """Return at least the l2 norms of rows of bounds; infinite where they overflow or are NaN."""
    n = values.shape[-1]
    largest = values.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    norms = torch.linalg.vector_norm(values / largest, dim=-1) * largest.squeeze(-1)
    return not_nan(norms * (1 + 2 * (n + 8) * 2.0**-52) + 8 * (n + 1) ** 0.5 * _TINY)


def not_nan(bounds: Tensor) -> Tensor:
    """Return bounds that are infinite where nothing is known."""
    return torch.where(bounds.isnan(), torch.inf, bounds)
