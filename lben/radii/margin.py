"""Within which radius can a prediction not change? Logits, their error and a proved bound tell.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from numpy.typing import NDArray
from torch import Tensor

from lben.certificates import LayerCertificate, PairCertificate
from lben.radii.error_bounds import Affine
from lben.rigorous import TINY, up
from lben.weights import as_number, convert

Bounds = (
    float
    | Real
    | PairCertificate
    | Sequence[Sequence[float]]
    | NDArray[np.floating[Any]]
    | Float[Tensor, "classes classes"]
    | Float[Tensor, ""]
)
"""γ of all outputs, or Lᵢⱼ of every pair of them."""
ROOT2 = up(math.sqrt(2.0))
_LEAST = 2.0**-960
"""A smaller radius is returned as 0, so that no returned radius is near underflow."""


def margin_radius(
    logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"] | Bool[Tensor, " batch"],
    bound: Bounds,
    *,
    logit_error: Float[Tensor, " batch"] | float = 0.0,
    elsewhere: Affine | None = None,
) -> Float[Tensor, " batch"]:
    """Return a radius in the l2 norm of raw inputs within which the prediction cannot change.

    r = max(0, min over j ≠ i of (yᵢ − yⱼ − √2 e) / Lᵢⱼ), rounded downwards. Lᵢⱼ is a Lipschitz
    bound of yᵢ − yⱼ: √2γ for every pair, or the pair's own bound. e bounds the l2 error of y, which
    moves yᵢ − yⱼ by at most √2e. The radius of a misclassified sample is 0. If the bounds of pairs
    are in the l∞ norm, so is the radius.

    This radius holds for the exact network. A network that runs has another error at another input
    of the ball. Let a + kr bound this error at distance r. If `elsewhere` holds a and k, the radius
    is (yᵢ − yⱼ − √2 (e + a)) / (Lᵢⱼ + √2k), and holds for the network as it runs.

    Args:
        logits: y.
        labels: i, integers of any type in [0, classes).
        bound: γ of the whole network from raw input to logits, or Lᵢⱼ of every pair: what
            `certify_pairs` returns, a table of numbers, or a tensor.
        logit_error: e, a bound of ‖y − y*‖₂ per sample (solver and rounding).
        elsewhere: a + kr, a bound of the same distance at every input within r.

    Returns:
        One radius ≥ 0 per sample, float64, in the l2 norm (l∞ for bounds of pairs in l∞).

    Raises:
        ValueError: if shapes disagree, a label is out of range, there are fewer than two classes,
            logits are not finite, or a bound is not positive.

    Example:
        >>> import torch
        >>> from lben import margin_radius
        >>> logits, labels = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 0])
        >>> margin_radius(logits, labels, 1.0).round(decimals=4)  # margin ÷ √2; 0 where wrong
        tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    labels = check_labels(logits, labels)
    pairs = pair_bounds(bound, logits.shape[1])
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits contain NaN or Inf")
    y = convert(logits, torch.float64)
    error = logit_error
    if not isinstance(error, Tensor):
        error = torch.as_tensor(error, dtype=torch.float64, device="cpu")
    if error.is_complex() or not bool((error >= 0).all()):
        raise ValueError("logit_error must be at least 0 and not NaN")
    error = convert(error, torch.float64).expand(len(y))[:, None]
    if elsewhere is not None:
        error = error + convert(elsewhere.constant, torch.float64)[:, None]
        pairs = (pairs + ROOT2 * elsewhere.slope) * (1 + 2.0**-48)
    index = labels.cpu()
    # Note [Radii at every magnitude]: all numbers are divided by 8, so that none overflows. A
    # number that underflows is below 2⁻¹⁰²²; a few times 2⁻¹⁰²² are subtracted. The subtractions
    # and the quotient round by under 8u of the largest number each, with u = 2⁻⁵² in any rounding
    # mode.
    y, error = y / 8, ROOT2 * error / 8 * (1 + 2.0**-48)
    margin = y.gather(1, index[:, None]) - y - error
    slack = 2.0**-48 * (y.abs().amax(1, keepdim=True) + error) + 16 * TINY
    radius = (margin - slack) / pairs[index].clamp_min(TINY) * (1 - 2.0**-48)
    radius = torch.where(radius > _LEAST, 8 * radius, 0.0)  # NaN, an infinite quotient, is 0
    radius = radius.scatter(1, index[:, None], math.inf).amin(1)
    if elsewhere is not None:
        limit = torch.as_tensor(elsewhere.limit, dtype=torch.float64, device="cpu")
        radius = torch.minimum(radius, limit * (1 - 2.0**-48)).clamp_min(0.0)
    return radius.clamp_max(torch.finfo(torch.float64).max).to(logits.device)


def pair_bounds(
    bound: Bounds,
    classes: int,
) -> Float[Tensor, "classes classes"]:
    """Return a bound of yᵢ − yⱼ for every pair: √2 times the bound of y, or the given table.

    Args:
        bound: γ, or a table of bounds Lᵢⱼ.
        classes: number of logits.

    Returns:
        classes × classes, float64, on the CPU.

    Raises:
        ValueError: if a bound is not a positive number, or pairs have another number of classes.

    Example:
        >>> pair_bounds(1.0, 2).round(decimals=4)
        tensor([[1.4142, 1.4142],
                [1.4142, 1.4142]], dtype=torch.float64)
    """
    number = as_number(bound)
    if number is not None:
        if not number > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        if number != bound:  # an integer, say, that no float64 is equal to
            number = up(number)
        size, value = (classes, classes), up(ROOT2 * number)
        return torch.full(size, value, dtype=torch.float64, device="cpu")
    table = _table(bound)
    if table.shape != (classes, classes):
        raise ValueError(f"pair bounds must be {classes} × {classes}, got {tuple(table.shape)}")
    if not bool((table > 0).all()):
        raise ValueError(f"bound must be positive, got {table}")
    return table


def _table(bound: object) -> Tensor:
    """Return a table of numbers in float64, on the CPU."""
    if isinstance(bound, PairCertificate):
        return bound.tensor()
    if not isinstance(bound, Tensor):
        try:
            bound = torch.from_numpy(np.array(bound, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"bound must be a number or a table of numbers, got {type(bound).__name__}"
            ) from error
    if bound.is_complex() or bound.dtype == torch.bool:
        raise ValueError(f"bound must be real, got {bound.dtype}")
    return convert(bound, torch.float64)


def check_labels(logits: Tensor, labels: Tensor) -> Int[Tensor, " batch"]:
    """Return the labels as int64, on the device of the logits.

    Args:
        logits: batch × classes.
        labels: integers of any type, or truth values, in [0, classes), one per row of logits.

    Raises:
        ValueError: if logits or labels are of another kind, shape or range.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (batch, classes ≥ 2), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be real floating-point numbers, got {logits.dtype}")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels must be a Tensor of {logits.shape[0]} integers, got a "
            f"{type(labels).__name__}: take torch.as_tensor(labels)"
        )
    inexact = labels.is_floating_point() or labels.is_complex()
    if labels.shape != logits.shape[:1] or inexact:
        raise ValueError(
            f"labels must be {logits.shape[0]} integers, got {tuple(labels.shape)} {labels.dtype}"
        )
    classes, labels = logits.shape[1], labels.detach().to(torch.int64)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must lie in [0, {classes}), "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )
    return labels if logits.is_meta else labels.to(logits.device)


def logit_error(
    certificate: LayerCertificate,
    state_error: Float[Tensor, "*batch"],
    bias_error: Float[Tensor, "*batch"],
    output_error: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Bound ‖y − y*‖₂ for y evaluated in float64 from an inexact state z.

    y* is the output at the exact equilibrium. The bound has three parts. The state error that the
    solver reports is multiplied by ‖CΛ^(−½)‖. The rounding δv of v = Ux + b moves z* by at most
    ‖δv‖_Λ / m. The rounding of Cz + Dx + b_y is added. The factors 2 and 4 cover the rounding in
    the evaluation of the last two parts.

    Args:
        certificate: of the same weights.
        state_error: bound of ‖z − z*‖_Λ for the problem with the rounded v.
        bias_error: bound of the rounding of v, in the Λ norm.
        output_error: bound of the rounding of y for given z, in l2.

    Returns:
        One l2 bound per sample, float64.
    """
    state = state_error + 2 * bias_error / certificate.m
    return (certificate.output_gain * state + 4 * output_error) * (1 + 1e-9)
