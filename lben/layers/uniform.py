"""How wrong can an equilibrium layer be, as it runs, anywhere in a ball?

Let the layer be known at x, where it found z, and run at x' within ρ of x with its tolerance τ.
Norms of states are in Λ. At x' it finds z' for a rounded v', and accepts it where

    ‖z̃' − z'‖ ≤ τ max(‖z̃'‖, ‖z'‖),      z̃' = σ(fl(Wz' + v')) = σ(Wz' + v' + ε),

so with r = z' − z̃' the point z̃' is the exact equilibrium of the drive v' + ε + Wr: the rounding
of v and of Wz' + v' acts as a change of the drive, what the tolerance allows as a residual, and the
gains of `lben.certificates.sensitivity` say what both do. Their sizes depend on how far the state
moves, μ ≥ ‖z' − z‖:

    ‖r‖ ≤ t(‖z‖ + μ),    ‖ε‖ ≤ ε(z) + gμ + c(‖v‖ + ‖U‖ρ + ‖δv‖),    ‖δv‖ ≤ δ(x) + γ‖|U|‖ρ,
    μ ≤ (1 + κ)‖r‖ + k(‖ε‖ + ‖δv‖) + ℓρ + e,

e the error of z, which is one linear inequality for μ. It bounds μ if its factor is positive; a
tolerance above that says nothing. Every bound is affine in ρ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates import Sensitivity
from lben.certified import Affine


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How sizes and roundings grow with the input and the state, states in the Λ norm.

    Attributes:
        drive: ‖v‖ per ‖x‖₂.
        drive_rounding: the rounding of v per ‖x‖₂.
        readout: the rounding of Cz per ‖z‖.
        through: the rounding of Dx per ‖x‖₂.
    """

    drive: float
    drive_rounding: float
    readout: float
    through: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Running:
    """How a layer runs, and what is known of it at x; states in the Λ norm, float64.

    Attributes:
        tol: t, what a solve accepts relative to its state, the rounding of norms and of σ included.
        product: g, bound of the rounding of Wz per ‖z‖.
        sum: c, bound of the rounding of Wz + v per ‖v‖, for accumulators that start from v.
        rates: how sizes and roundings grow with the input and the state.
        state: ‖z‖ per sample.
        state_error: e, bound of ‖z − z*‖ per sample.
        product_rounding: ε(z), bound of the rounding of Wz per sample.
        bias: ‖v‖ per sample.
        bias_rounding: δ(x), bound of the rounding of v per sample.
        output_rounding: bound of the rounding of y, for this z and x, per sample.
    """

    tol: float
    product: float
    sum: float
    rates: Rates
    state: Float[Tensor, " batch"]
    state_error: Float[Tensor, " batch"]
    product_rounding: Float[Tensor, " batch"]
    bias: Float[Tensor, " batch"]
    bias_rounding: Float[Tensor, " batch"]
    output_rounding: Float[Tensor, " batch"]


def uniform_error(layer: Running, gains: Sensitivity) -> Affine:
    """Bound ‖y − y*‖₂ of the layer as it runs, at every input within ρ of x.

    Infinite where the tolerance is too loose to say anything.
    """
    rates = layer.rates
    bias_rounding = Affine(layer.bias_rounding, rates.drive_rounding)
    at_rest = Affine(layer.product_rounding, 0.0) + Affine(layer.bias, rates.drive) * layer.sum
    bias = bias_rounding * (1 + layer.sum) + at_rest
    spread = 1 + gains.residual_to_state
    room = 1 - (spread * layer.tol + gains.drive_to_state * layer.product) * (1 + 2.0**-40)
    if not room > 0:
        return Affine(torch.full_like(layer.state, math.inf), math.inf)
    moved = (
        Affine(layer.state, 0.0) * (spread * layer.tol)
        + bias * gains.drive_to_state
        + Affine(layer.state_error, gains.input_to_state)
    ) * (1 / room)
    residual = (Affine(layer.state, 0.0) + moved) * layer.tol
    drive = bias + moved * layer.product
    output_rounding = Affine(layer.output_rounding, rates.through) + moved * rates.readout
    return (
        residual * (gains.state_to_output + gains.residual_to_output)
        + drive * gains.drive_to_output
        + output_rounding
    )


def absolute_norm(matrix: Float[Tensor, "rows columns"]) -> float:
    """Bound ‖|A|‖₂ from above by √(largest row sum · largest column sum), for float64 A."""
    size = matrix.abs()
    if size.numel() == 0:
        return 0.0
    scale = float(size.max())
    if not 0 < scale < math.inf:
        return scale
    size = size / scale
    root = math.sqrt(float(size.sum(0).max())) * math.sqrt(float(size.sum(1).max()))
    return root * scale * (1 + 8 * (sum(matrix.shape) + 4) * 2.0**-53)
