"""How wrong can an equilibrium layer be, as it runs, anywhere in a ball?

The layer was solved at x, where it found the state z. It runs at x' within ρ of x, with the
relative tolerance τ. Norms of states are in Λ. At x' the layer computes a rounded drive v' and
finds a state z'. It accepts z' if

    ‖z̃' − z'‖ ≤ τ max(‖z̃'‖, ‖z'‖),      z̃' = σ(fl(Wz' + v')) = σ(Wz' + v' + ε),

where ε is the rounding of Wz' + v'. Let r = z' − z̃'. Then z̃' is the exact equilibrium of the drive
v' + ε + Wr. So the rounding of v' and of Wz' + v' acts as a change of the drive, and r, which the
tolerance allows, acts as a residual. The gains of `lben.certificates.sensitivity` bound the effect
of both. The sizes of ε and r depend on how far the state moves. With a bound μ ≥ ‖z' − z‖,

    ‖r‖ ≤ t(‖z‖ + μ),    ‖ε‖ ≤ ε(z) + gμ + c(‖v‖ + ‖U‖ρ + ‖δv‖),    ‖δv‖ ≤ δ(x) + γ‖|U|‖ρ,
    μ ≤ (1 + κ)‖r‖ + k(‖ε‖ + ‖δv‖) + ℓρ + e.

Here δv is the rounding of v', δ(x) bounds the rounding of v, and γ‖|U|‖ the rounding of v per ‖x‖₂;
κ, k and ℓ are the gains from a residual, from the drive and from the input to the state; e bounds
the error of z; t, g, c and ε(z) are attributes of `Running`. Together these are one linear
inequality for μ. It bounds μ if the factor of μ is positive. At a larger tolerance the factor is
not, and no error is bounded. Every bound is affine in ρ.

Symbols: docs/glossary.md.
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
    """The constants of a layer that runs, and its sizes and errors at x; states in the Λ norm.

    Attributes:
        tol: t, the relative residual that a solve accepts, with the rounding of norms and of σ.
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
    state: Float[Tensor, "*batch"]
    state_error: Float[Tensor, "*batch"]
    product_rounding: Float[Tensor, "*batch"]
    bias: Float[Tensor, "*batch"]
    bias_rounding: Float[Tensor, "*batch"]
    output_rounding: Float[Tensor, "*batch"]
    size: Float[Tensor, "*batch"]
    unit: float
    largest: float


def uniform_error(layer: Running, gains: Sensitivity) -> Affine:
    """Return a bound of ‖y − y*‖₂ of the layer as it runs, at every input within ρ of x.

    Args:
        layer: its constants, and its sizes and errors at x.
        gains: of its weights.

    Returns:
        The bound, affine in ρ, per sample; infinite if the tolerance is too loose for one.
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
    """Return the largest ρ at which no number overflows, from the bounds of roundings.

    A bound of a rounding is at least half an ulp of the rounded number. So that number is at most
    1/u times the bound.
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
