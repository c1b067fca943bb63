"""Within which radius can a prediction not change? From logits, their error and a proved bound."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lben.certificates import Certificate
from lben.rigorous import up

ROOT2 = up(math.sqrt(2.0))


def certified_radius(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Bool[Tensor, " batch"],
    bound: float | Float[Tensor, "classes classes"],
    *,
    logit_error: Float[Tensor, " batch"] | float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return a radius in the l2 norm of raw inputs within which the prediction cannot change.

    r = max(0, min over j ≠ i of (yᵢ − yⱼ − √2 e) / Lᵢⱼ), rounded downwards, where Lᵢⱼ bounds
    (eᵢ − eⱼ)ᵀy: √2γ for every pair, or the pair's own bound. An error of at most e in y moves the
    difference by at most √2e. 0 for a sample that is misclassified.

    Args:
        logits: y.
        labels: i, integers of any type in [0, classes).
        bound: γ of the whole network from raw input to logits, or Lᵢⱼ of every pair.
        logit_error: e, a bound of ‖y − y*‖₂ per sample (solver and rounding).

    Raises:
        ValueError: if shapes disagree, a label is out of range, there are fewer than two classes,
            logits are not finite, or a bound is not positive.
    """
    labels = check_labels(logits, labels)
    pairs = pair_bounds(bound, logits.shape[1]).to(logits.device)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits contain NaN or Inf")
    y = logits.detach().double()
    error = torch.as_tensor(logit_error, dtype=torch.float64, device=y.device)
    error = ROOT2 * error.expand(len(y))[:, None]
    if not bool((error >= 0).all()):
        raise ValueError("logit_error must be at least 0 and not NaN")
    constants = pairs[labels]
    radius = (y.gather(1, labels[:, None]) - y - error) / constants
    # The subtraction of logits, the error term and the quotient round by under 4 u each.
    slack = 8 * 2.0**-53 * (y.abs().amax(1, keepdim=True) + error) / constants
    radius = radius - slack - radius.abs() * 2.0**-50
    radius = radius.nan_to_num(nan=0.0)  # an infinite margin less an infinite slack
    return radius.scatter(1, labels[:, None], math.inf).amin(1).clamp_min(0)


def pair_bounds(
    bound: float | Float[Tensor, "classes classes"], classes: int
) -> Float[Tensor, "classes classes"]:
    """Return a bound of yᵢ − yⱼ for every pair: √2 times that of all of y, or those given.

    Raises:
        ValueError: if a bound is not positive, or pairs have another number of classes.
    """
    if not bool((torch.as_tensor(bound) > 0).all()):
        raise ValueError(f"bound must be positive, got {bound}")
    if not isinstance(bound, Tensor):
        return torch.full((classes, classes), up(ROOT2 * bound), dtype=torch.float64)
    if bound.shape != (classes, classes):
        raise ValueError(f"pair bounds must be {classes} × {classes}, got {tuple(bound.shape)}")
    return bound.detach().to("cpu", torch.float64)


def check_labels(logits: Tensor, labels: Tensor) -> Int[Tensor, " batch"]:
    """Return labels as int64, where the logits are.

    Args:
        logits: batch × classes.
        labels: integers of any type, or truth values, in [0, classes), one per row of logits.

    Raises:
        ValueError: if they are not.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (batch, classes ≥ 2), got {tuple(logits.shape)}")
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
    certificate: Certificate,
    state_error: Float[Tensor, " batch"],
    bias_error: Float[Tensor, " batch"],
    output_error: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Bound ‖y − y*‖₂ for y evaluated in float64 from an inexact state z.

    y* is the output at the exact equilibrium. Three parts: the state error as the solver saw it,
    through ‖CΛ^(−½)‖; rounding of v = Ux + b, which moves z* by at most ‖δv‖_Λ / m; and rounding of
    Cz + Dx + b_y. The factors 2 and 4 cover the rounding of the last two themselves.

    Args:
        certificate: of the same weights.
        state_error: bound of ‖z − z*‖_Λ for the problem with the rounded v.
        bias_error: bound of the rounding of v, in the Λ norm.
        output_error: bound of the rounding of y for given z, in l2.
    """
    state = state_error + 2 * bias_error / certificate.m
    return (certificate.output_gain * state + 4 * output_error) * (1 + 1e-9)
