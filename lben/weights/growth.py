"""How does the rounding error of a layer grow with its input? At most affinely, up to overflow.

Let fl(y) be the computed output. Then ‖fl(y) − y‖₂ ≤ constant + slope·‖x‖₂ for every x of one shape
below a limit. So constant + slope·(‖x₀‖₂ + r) bounds the error at every x within r of x₀.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# These functions compute with Python floats. Their results are upper bounds in every rounding mode,
# with denormal numbers flushed or not: each result is raised by far more than its rounding error,
# and is never below _LEAST.
_UP = 1 + 2.0**-48
_LEAST = 2.0**-1000


def add_up(*terms: float) -> float:
    """Return an upper bound of a sum of numbers ≥ 0; infinite where one is NaN."""
    total = 0.0
    for term in terms:
        total = (total + term) * _UP
    return math.inf if math.isnan(total) else total


def times_up(*factors: float) -> float:
    """Return an upper bound of a product of numbers ≥ 0; infinite for 0 · ∞ and for NaN."""
    if any(math.isnan(f) or f == math.inf for f in factors):
        return math.inf
    if any(f == 0 for f in factors):
        return 0.0
    product = 1.0
    for factor in factors:
        product = max(product * max(factor, _LEAST) * _UP, _LEAST)
    return product


@dataclass(frozen=True)
class Growth:
    """The affine bound constant + slope·‖x‖₂ of a rounding error or of a norm.

    Attributes:
        constant: bound at x = 0.
        slope: growth of the bound per unit of ‖x‖₂.
        limit: largest ‖x‖₂ for which the bound holds; beyond it a number may overflow.
    """

    constant: float
    slope: float
    limit: float = math.inf

    def __add__(self, other: Growth) -> Growth:
        return Growth(
            add_up(self.constant, other.constant),
            add_up(self.slope, other.slope),
            min(self.limit, other.limit),
        )

    def times(self, factor: float) -> Growth:
        """Return the bound multiplied by a number ≥ 0."""
        return Growth(times_up(self.constant, factor), times_up(self.slope, factor), self.limit)

    def plus(self, constant: float) -> Growth:
        """Return the bound with a number ≥ 0 added."""
        return Growth(add_up(self.constant, constant), self.slope, self.limit)

    def after(self, size: Growth) -> Growth:
        """Return the bound in terms of ‖x‖₂; `size` bounds the norm of its own input by ‖x‖₂."""
        return Growth(
            add_up(self.constant, times_up(self.slope, size.constant)),
            times_up(self.slope, size.slope),
            min(self.limit, size.limit, size.reach(self.limit)),
        )

    def reach(self, largest: float) -> float:
        """Return a lower bound of the largest ‖x‖₂ at which the bound is at most `largest`."""
        if largest == math.inf or (self.slope == 0 and self.constant <= largest):
            return self.limit
        if not self.constant <= largest:
            return -math.inf
        return min(self.limit, (largest - self.constant) / times_up(self.slope, _UP) * (2 - _UP))

    def at(self, norm: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Return the bound in float64 at upper bounds of ‖x‖₂, rounded up; infinite past `limit`.

        Args:
            norm: as `norms_up` returns.
        """
        norm = norm.detach().double()
        total = norm.new_full(norm.shape, self.constant)
        if self.slope:
            total = total + (norm * self.slope).clamp_min(_LEAST) * _UP
        return torch.where(total.isnan() | ~(norm <= self.limit), math.inf, total * _UP)


def norms_up(x: Tensor, dims: int) -> Float[Tensor, "*batch"]:
    """Return upper bounds of ‖x‖₂ over the last dimensions, in float64.

    Args:
        x: float32 or float64, any size of entries; NaN counts as infinite.
        dims: how many dimensions make a sample.
    """
    batch, count = x.shape[: x.ndim - dims], math.prod(x.shape[x.ndim - dims :])
    if not count or not x.numel():
        return x.new_zeros(batch, dtype=torch.float64)
    wide = x.detach().reshape(*batch, count).double().abs()
    largest = wide.amax(-1, keepdim=True)
    # Entries are divided by the largest one, so squares cannot overflow, and squares that underflow
    # are below the rounding error. A number that the processor reads as zero is at most `tiny`.
    unit = largest.clamp(2.0**-1000, 2.0**1000)
    norm = (wide / unit).square().sum(-1).sqrt() * unit[..., 0]
    norm = norm * (1 + (count + 16) * 2.0**-51) + math.sqrt(count) * torch.finfo(x.dtype).tiny
    return torch.where(norm.isfinite(), norm, math.inf)


def norm_up(x: Tensor) -> float:
    """Return an upper bound of ‖x‖₂ over all entries.

    Args:
        x: float32 or float64.
    """
    return float(norms_up(x, x.ndim))


def absolute_norm(U: Tensor) -> float:
    """Bound ‖ |U| ‖₂ by √(largest row sum × largest column sum), for a matrix or a kernel.

    Sums of a kernel run over all offsets. Then the bound holds for its convolution of any image.

    Args:
        U: q × p, or q × p × k × k.
    """
    if not U.numel():
        return 0.0
    size = U.detach().double().abs()
    # Entries are divided by the largest one, so that no sum overflows or underflows.
    unit = min(max(float(size.amax()), 2.0**-1000), 2.0**1000)
    size = size / unit
    size = size.flatten(2).sum(2) if size.ndim > 2 else size
    rows, columns = float(size.sum(1).amax()), float(size.sum(0).amax())
    relative = math.sqrt(rows * columns) * (1 + 4 * U.numel() * 2.0**-53 + 2.0**-40)
    return add_up(times_up(relative, unit), U.numel() * torch.finfo(U.dtype).tiny)


def largest_up(x: Tensor) -> float:
    """Return an upper bound of the largest absolute value of an entry; 0 if there is none.

    Args:
        x: of any shape.
    """
    if not x.numel():
        return 0.0
    return add_up(float(x.detach().double().abs().amax()), torch.finfo(x.dtype).tiny)


def underflow(terms: int, inputs: Tensor, weights: Tensor, dims: int = 1) -> Tensor:
    """Return a bound of the underflow in each float64 sum of products of inputs and weights.

    A product of a and b loses at most t(1 + |a| + |b|), with t the smallest normal number, even if
    denormal results and operands are read as zero: see Note [Rounding model].

    Args:
        terms: products per sum.
        inputs: (*batch, …), the last `dims` dimensions make a sample.
        weights: all factors of the inputs.
        dims: of a sample.

    Returns:
        A number per sample, of shape (*batch, 1, …).
    """
    largest = norms_up(inputs, dims) + (1 + largest_up(weights))
    lost = largest * (2 * (terms + 4) * torch.finfo(torch.float64).tiny)
    return lost.reshape(*lost.shape, *[1] * dims)


def not_nan(bounds: Tensor) -> Tensor:
    """Return the bounds with infinity in place of NaN.

    Args:
        bounds: of any shape.
    """
    return torch.where(bounds.isnan(), torch.inf, bounds)
