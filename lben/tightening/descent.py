"""Which input of a set makes an output small? Descent along gradients finds one.

Nothing is proved here. Where an output is not positive, no proof of the contrary has to be sought.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates.relaxation import InputRegion, multipliers_of
from lben.tightening.relaxation import Lines, Proposal, back_substitute
from lben.weights.affine_system import AffineSystem, slope_at

_STEPS = 30


@torch.no_grad()
def find_smallest(
    system: AffineSystem,
    targets: Float[Tensor, "batch q"],
    region: InputRegion,
    *,
    steps: int = _STEPS,
) -> Float[Tensor, " batch"]:
    """Return the least tᵀy that descent along gradients meets on sets, as computed.

    Args:
        system: the equations, in any dtype.
        targets: t, one a set.
        region: of the inputs.
        steps: of descent, with shrinking length.

    Returns:
        One value per set.
    """
    move = torch.zeros_like(region.center)
    ball = region.radius.isfinite()[:, None]
    radius = torch.where(ball, region.radius[:, None], 0.0)
    least = torch.full((len(targets),), math.inf, dtype=move.dtype)
    for step in range(steps + 1):
        *values, y = system.evaluate(region.center + move)
        least = torch.minimum(least, (targets * y).sum(1))
        slopes = {
            j: slope_at(a, v)
            for j, (a, v) in enumerate(zip(system.activations, values, strict=True), 1)
        }
        lines = {j: Lines.tangential(s) for j, s in slopes.items()}
        tau = back_substitute(system, system.output, targets, lines, Proposal.of(lines))
        g = system.pull(0, multipliers_of(system, system.output, targets, tau)) / system.std
        length = 0.5 * (1 - step / (steps + 1))
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp_min(1e-30)
        move = move - length * torch.where(ball, radius * g / norm, region.reach() * g.sign())
        size = torch.linalg.vector_norm(move, dim=1, keepdim=True).clamp_min(1e-30)
        move = torch.where(ball, move * (radius / size).clamp_max(1.0), move)
        move = move.clamp(region.lower, region.upper)
    return least
