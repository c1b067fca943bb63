"""What do all parameterizations of a feed-forward layer (W = 0) have in common?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lben.parameterizations.parametrized import PicklableParametrized
from lben.weights import ConvolutionalWeights, DenseWeights
from lben.weights.sizes import integer
from solvers.precision import cast

# Note [Slack for the proof]
# M(Λ, γ) of these layers is singular at γ = 1: in a residual layer its upper left block
# γI − DᵀD/γ is zero, and 2Λ − CᵀC is singular where T − UUᵀ is. Floating point proves no singular
# matrix, so the claim is a millionth above 1, and T⁻¹ is two millionths smaller than exact
# arithmetic admits (which also covers the few roundings of its evaluation in float32).
UNIT_BOUND = 1.0 + 1e-6
PROOF_SLACK = 2.0**-19


class FeedforwardParameterization(PicklableParametrized, ABC):
    """Base of the free tensors of a feed-forward layer that is 1-Lipschitz for every value.

    A subclass returns the tensors that the layer runs with (`forward`) and, in float64, the weights
    of the same layer (`dense`, `convolutional`), which a certificate proves.

    Args:
        shape: of the weight: two sizes for a matrix, four for the kernel of a convolution.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> from lben.parameterizations import (
        ...     FeedforwardParameterization, ResidualParameterization, Spectral
        ... )
        >>> free = ResidualParameterization((8, 4), Spectral())
        >>> isinstance(free, FeedforwardParameterization), free.shape
        (True, (8, 4))
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) not in (2, 4):
            raise ValueError(f"a weight has 2 or 4 sizes, each at least 1, got {shape}")
        self.shape = tuple(integer(f"every size of the weight {shape}", n) for n in shape)

    @abstractmethod
    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors that the layer runs with, differentiable in the free tensors.

        They have the dtype of the parameters. A weight is rounded to `compute_dtype` before its
        multiplier is computed, so that the bound holds for the rounded weight.

        Args:
            compute_dtype: the precision in which the layer's products run.

        Raises:
            ValueError: if the weights are not finite, or T leaves the range of their dtype.
        """

    @abstractmethod
    def blank(self, like: Tensor) -> list[Tensor]:
        """Return uninitialised contiguous tensors of the shapes and dtypes of `forward`'s."""

    @abstractmethod
    def dense(self, compute_dtype: torch.dtype) -> DenseWeights:
        """Return the float64 weights of the dense layer that runs in `compute_dtype`, exactly."""

    @abstractmethod
    def convolutional(self, compute_dtype: torch.dtype, *, circular: bool) -> ConvolutionalWeights:
        """Return the float64 kernels of the convolution that runs in `compute_dtype`, exactly."""

    def to_exact(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors of `forward` in float64: products of two float32 numbers are exact."""
        return tuple(cast(t, torch.float64) for t in self(compute_dtype))

    @staticmethod
    def in_range(scales: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """Return the scales computed from T, after a check that they are positive normal numbers.

        They are not if the weights hold NaN or infinite numbers, or if T leaves the range of the
        dtype. Such a scale becomes NaN. So where the host cannot read values (in a transform of
        torch.func, while a CUDA graph is captured) the layer returns NaN instead of a wrong value.

        Args:
            scales: made of T.
            biases: checked to be finite.

        Raises:
            ValueError: if a scale is no positive normal number, or a bias is not finite.
        """
        tiny = torch.finfo(scales[0].dtype).tiny
        fit = [(s >= tiny) & s.isfinite() for s in scales]
        checked = [torch.where(f, s, math.nan) for f, s in zip(fit, scales, strict=True)]
        blind = scales[0].is_meta or torch._C._are_functorch_transforms_active()
        if blind or (scales[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return checked
        with torch.no_grad():
            ok = torch.stack([t.all() for t in (*fit, *(b.isfinite() for b in biases))])
            if not bool(ok.all()):
                raise ValueError(_out_of_range(scales[0].dtype))
        return checked

    @staticmethod
    def rounded(weight: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return the weight rounded to `compute_dtype`, in its own dtype."""
        return (
            weight if compute_dtype == weight.dtype else weight.to(compute_dtype).to(weight.dtype)
        )


def compute(module: nn.Module, name: str) -> Tensor:
    """Return a module's weight, which a parametrization of torch may compute on access.

    Raises:
        ValueError: if the linear algebra of the parametrization fails.
    """
    try:
        weight: Tensor = getattr(module, name)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        own = next(module.parameters()).dtype
        raise ValueError(_out_of_range(own)) from error
    return weight


def _out_of_range(dtype: torch.dtype) -> str:
    return (
        "the weights contain NaN or Inf, or numbers so large or small that T leaves the range of "
        f"{dtype}: did training diverge? Scale the weights towards 1, or use float64"
    )
