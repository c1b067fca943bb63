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
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates import Sensitivity
from lben.radii.error_bounds import Affine
from lben.weights import Rates


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
        size: ‖x‖₂ per sample.
        unit: u, half an ulp of 1 in the precision that runs.
        largest: how large v, z, Wz + v and y may be before a number can overflow, in these norms.
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
    size: Float[Tensor, " batch"]
    unit: float
    largest: float


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
    limit = _limit(layer, Affine(layer.state, 0.0) + moved)
    output_rounding = Affine(layer.output_rounding, rates.through) + moved * rates.readout
    found = (
        residual * (gains.state_to_output + gains.residual_to_output)
        + drive * gains.drive_to_output
        + output_rounding
    )
    return replace(found, limit=limit)


def _limit(layer: Running, state: Affine) -> Tensor:
    """Return the largest ρ at which nothing overflows, by the sizes that roundings are part of.

    A rounding is at least half an ulp of what it rounds, so sizes are below 1/u roundings.
    """
    rates, ulp = layer.rates, layer.unit
    x = Affine(layer.size, 1.0)
    sums = Affine(layer.bias, 0.0) + x * rates.drive + state * (1 + layer.product / ulp)
    outputs = state * (rates.readout / ulp) + x * (rates.through / ulp)
    outputs = outputs + Affine(layer.output_rounding / ulp, 0.0)
    limit = torch.full_like(layer.size, math.inf)
    for size in (sums, outputs):
        reach = (layer.largest - size.constant) / (size.slope + 2.0**-1000)
        limit = torch.minimum(limit, reach.nan_to_num(nan=-1.0))
    return limit
