"""What has every parameterization of an explicit layer (W = 0)?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lben.parameterizations.parametrized import PicklableParametrized
from lben.parameterizations.sizes import integer
from lben.weights import ConvolutionalWeights, DenseWeights
from solvers.precision import cast

# Note [Room for the proof]
# M(Λ, γ) of these layers is singular at γ = 1: in a residual layer its upper left block
# γI − DᵀD/γ is zero, and 2Λ − CᵀC touches zero where T touches UUᵀ. A proof in floating point needs
# room, so the claim is a millionth above 1, and T⁻¹ is two millionths smaller than it may be (which
# also covers the few roundings of its evaluation in float32).
UNIT_BOUND = 1.0 + 1e-6
PROOF_SLACK = 2.0**-19


class FeedforwardParameterization(PicklableParametrized, ABC):
    """Free tensors of a layer that is 1-Lipschitz for each of their values.

    Args:
        shape: of the weight: two sizes for a matrix, four for the kernel of a convolution.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) not in (2, 4):
            raise ValueError(f"a weight has 2 or 4 sizes, each at least 1, got {shape}")
        self.shape = tuple(integer(f"every size of the weight {shape}", n) for n in shape)

    @abstractmethod
    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors with which the layer runs in a precision, differentiable.

        They keep the precision of the parameters; a weight is rounded to `compute_dtype` before its
        multiplier is computed, so that the bound is that of the rounded weight.
        """

    @abstractmethod
    def blank(self, like: Tensor) -> list[Tensor]:
        """Return contiguous tensors of the shapes and dtypes that `forward` returns, unset."""

    @abstractmethod
    def dense(self, compute_dtype: torch.dtype) -> DenseWeights:
        """Return the float64 weights of a linear layer that runs in a precision, exactly."""

    @abstractmethod
    def convolutional(self, compute_dtype: torch.dtype, *, circular: bool) -> ConvolutionalWeights:
        """Return the float64 weights of a convolutional layer that runs in a precision, exactly."""

    def exact(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return what runs, in float64: products of two float32 numbers are exact there."""
        return tuple(cast(t, torch.float64) for t in self(compute_dtype))

    @staticmethod
    def in_range(scales: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """Return scales that T makes, or refuse those that are no normal numbers.

        They are none where the weights hold NaN or infinite numbers, which T inherits, or where T
        leaves the range of the dtype. NaN takes their place first: where the host cannot look (in a
        transform of torch.func, while a CUDA graph is captured) what runs is NaN, not wrong.

        Raises:
            ValueError: naming the reason.
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
        """Return the weight rounded to a precision, in its own."""
        return (
            weight if compute_dtype == weight.dtype else weight.to(compute_dtype).to(weight.dtype)
        )


def compute(module: nn.Module, name: str) -> Tensor:
    """Return a weight that a parametrization of torch may compute.

    Raises:
        ValueError: if its linear algebra fails.
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


def taps(vector: Tensor) -> Tensor:
    """Return one number per channel, shaped to scale the pixels of images and kernels."""
    return vector[:, None, None]


def mirror(kernel: Tensor) -> Tensor:
    """Return the kernel of the adjoint convolution."""
    return kernel.transpose(0, 1).flip(2, 3)
