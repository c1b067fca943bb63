"""How large is the rounding error of one layer, stage by stage?

Note [Rounding model]
With u the unit roundoff and t the smallest normal number of the dtype,

    |fl(a ∘ b) − a ∘ b| ≤ u|a ∘ b| + t(1 + |a| + |b|) for products, + 3t for sums,

This holds whether or not denormal operands and results are flushed to zero. A sum of k products
that starts from a bias has at most k + 1 roundings on every path, for every order of summation,
every number of accumulators, with or without fused multiply-adds. Its error is at most
γ_{k+2}(Σ|a||b| + |bias|) (Higham 2002, section 3.1). So direct and im2col convolutions and every
classical matrix product are covered. Algorithms that sum other products (Winograd's, FFT,
Strassen's) are not.

An activation is accurate to `ProximalActivation.ulps` units in the last place. The model charges
twice this number, and at least 16 units.

Errors and sizes are affine in ‖x‖₂. A norm may have one weight per entry: an entry that is large in
one stage and small in the next is then not counted as large in both.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lben.weights.growth import (
    Growth,
    absolute_norm,
    add_up,
    largest_up,
    norm_up,
    times_up,
)
from lben.weights.linear_maps import LinearMap
from solvers import ProximalActivation, ReLU


@dataclass(frozen=True)
class Signal:
    """A vector inside a layer, described by bounds of its norm and of its error.

    Attributes:
        dtype: in which it is computed.
        size: bound of the l2 norm of the exact vector.
        error: bound of the l2 distance of the computed vector to the exact one.
    """

    dtype: torch.dtype
    size: Growth
    error: Growth

    @classmethod
    def input(cls, dtype: torch.dtype) -> Signal:
        """Return x itself."""
        return cls(dtype, Growth(0.0, 1.0), Growth(0.0, 0.0))

    @property
    def computed(self) -> Growth:
        """Bound of the l2 norm of the computed vector."""
        return self.size + self.error

    def linear(
        self,
        norm: float,
        *,
        terms: int,
        ones: float,
        bias: float = 0.0,
        unweighted: float | None = None,
        inputs: int,
        share: float = 1.0,
    ) -> Signal:
        """Return the signal of Ax + b, where the sums of products may start from b.

        Args:
            norm: bound of ‖ |A| ‖₂, in the weights of either side.
            terms: products per output, plus roundings of the entries of A.
            ones: l2 norm of the weights of all outputs (√outputs without weights).
            bias: l2 norm of b over all outputs, in their weights.
            unweighted: bound of ‖ |A| ‖₂ for inputs without weights, if they have some.
            inputs: entries of x.
            share: largest weight of an output ÷ weight of an input.
        """
        tiny, g = _tiny(self.dtype), _gamma(terms + 2, self.dtype)
        size = self.size.times(norm).plus(bias)
        through = times_up(norm if unweighted is None else unweighted, math.sqrt(inputs))
        lost = Growth(
            times_up(2 * tiny, add_up(times_up(4.0 * terms + 4, ones), through)),
            times_up(2 * tiny, math.sqrt(terms), max(ones, 1.0), max(share, 1.0)),
        ).after(self.computed)
        rounded = self.computed.times(norm).plus(bias).times(g)
        return replace(self, size=size, error=self.error.times(norm) + rounded + lost)

    def activate(self, activation: ProximalActivation, at_zero: float, ones: float) -> Signal:
        """Return the signal of σ; `at_zero` is ‖σ(0)‖₂, `ones` ‖1‖₂, in the units' weights."""
        size = self.size.plus(at_zero)
        if type(activation) is ReLU:
            return replace(self, size=size)
        rounded = (self.computed.plus(at_zero)).times(_gamma(_ulps(activation), self.dtype))
        return replace(
            self, size=size, error=self.error + rounded.plus(times_up(4 * _tiny(self.dtype), ones))
        )

    def plus(self, other: Signal, entries: int) -> Signal:
        """Return the signal of the sum, or of the difference, of two vectors."""
        rounded = (self.computed + other.computed).times(_gamma(2, self.dtype))
        lost = times_up(4 * _tiny(self.dtype), math.sqrt(entries))
        return replace(
            self,
            size=self.size + other.size,
            error=self.error + other.error + rounded.plus(lost),
        )

    def off(self, relative: float, lost: float = 0.0) -> Signal:
        """Return the signal with a relative and an absolute error added."""
        return replace(self, error=self.error + self.computed.times(relative).plus(lost))

    def below(self, *sizes: Growth) -> Growth:
        """Return the error bound, limited to the ‖x‖₂ for which none of these sizes overflows."""
        largest = torch.finfo(self.dtype).max / 4
        limit = min(size.reach(largest) for size in (*sizes, self.computed))
        if not limit >= 0:
            return Growth(math.inf, math.inf, 0.0)
        return replace(self.error, limit=min(self.error.limit, limit))


class Units:
    """The hidden units of a layer, each measured with a weight w.

    Args:
        map: from inputs to units.
        shape: of one sample.
        U: a matrix or kernel of the map.
        w: float64, one weight per unit or channel.
        inner: factor of each output of the map before the bias is added; None for 1.
    """

    def __init__(
        self,
        map: LinearMap,
        shape: tuple[int, ...],
        U: Tensor,
        w: Tensor,
        inner: Tensor | None = None,
    ) -> None:
        self.shape, self.w, self.inner = shape, w, inner
        self.hidden = map.outputs(shape, len(U))
        self.pixels = math.prod(self.hidden[1:])

    def norm(self, vector: Tensor) -> float:
        """Bound the l2 norm, over all units, of a vector that has one number per channel."""
        return times_up(norm_up(vector), math.sqrt(self.pixels))

    def enter(
        self, x: Signal, U: Tensor, scaled: Tensor, b: Tensor, activation: ProximalActivation
    ) -> Signal:
        """Return the signal of σ(Ux + b); `scaled` is U as it acts, in the weights of the units."""
        norm, ones = absolute_norm(scaled), self.norm(self.w)
        inner = self.w if self.inner is None else self.w * self.inner.double().clamp_min(1)
        v = x.linear(
            norm, terms=U[0].numel() + 3, inputs=math.prod(self.shape), ones=self.norm(inner),
            bias=self.norm(self.w * b.double()),
        )  # fmt: skip
        zero = times_up(at_zero(activation, self.w.to(x.dtype)), math.sqrt(self.pixels))
        return v.activate(activation, zero, ones)

    def leave(
        self, h: Signal, U: Tensor, scaled: Tensor, weighted: Tensor, share: Tensor,
        bias: Tensor | None = None,
    ) -> Signal:  # fmt: skip
        """Return the signal of Uᵀ(s ∘ h) + b; `scaled` is s ∘ U, `weighted` that for weighted h."""
        outputs = U.shape[1] * math.prod(self.shape[1:])
        b = 0.0 if bias is None else times_up(norm_up(bias), math.sqrt(outputs // U.shape[1]))
        return h.linear(
            absolute_norm(weighted), terms=U[:, 0].numel() + 3, inputs=math.prod(self.hidden),
            ones=math.sqrt(outputs), bias=b, share=largest_up(share),
            unweighted=add_up(absolute_norm(scaled), absolute_norm(U)),
        )  # fmt: skip


def at_zero(activation: ProximalActivation, weights: Tensor) -> float:
    """Return ‖w ∘ σ(0)‖₂ over the units: |σ(v)| ≤ |v| + |σ(0)|."""
    zero = activation(torch.zeros_like(weights)).detach().double()
    return norm_up(weights.double() * zero) * (1 + _gamma(2 * _ulps(activation), weights.dtype))


def _ulps(activation: ProximalActivation) -> int:
    """Return how many roundings σ is charged with: two for each of its `ulps`, doubled."""
    return max(32, 4 * math.ceil(activation.ulps))


def _tiny(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny


def _gamma(k: int, dtype: torch.dtype) -> float:
    """Return γ_k, infinite where k is too large for the dtype."""
    unit = k * torch.finfo(dtype).eps / 2
    return math.inf if unit >= 0.5 else unit / (1 - unit) * (1 + 2.0**-40)


def rows(vector: Tensor, weight: Tensor) -> Tensor:
    """Return one number per row, shaped to scale the rows of a matrix or kernel."""
    return vector.reshape(-1, *[1] * (weight.ndim - 1))


def columns(vector: Tensor, weight: Tensor) -> Tensor:
    """Return one number per column, shaped to scale the columns of a matrix or kernel."""
    return vector.reshape(1, -1, *[1] * (weight.ndim - 2))
