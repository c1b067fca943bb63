"""How does a weight act on images or features, and how does its transpose act?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from lben import precision
from lben.weights.sizes import flag, integer


class LinearMap(ABC):
    """x ↦ Ux + b and its adjoint h ↦ Uᵀh: ⟨Ux, h⟩ = ⟨x, Uᵀh⟩ for every x and h."""

    @abstractmethod
    def apply(self, x: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
        """Return Ux + b."""

    @abstractmethod
    def adjoint(self, h: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
        """Return Uᵀh + b."""

    @abstractmethod
    def spread(self, vector: Tensor) -> Tensor:
        """Return one number per unit or channel, shaped to scale outputs of the map."""

    @property
    @abstractmethod
    def dims(self) -> int:
        """Dimensions of one sample."""

    @abstractmethod
    def outputs(self, shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Return the shape of the output for one sample of a shape, with this many channels."""

    def refuse_other_sums(self, U: Tensor) -> None:
        """Raise ValueError if products may be summed in a way whose rounding is not bounded."""
        return

    @abstractmethod
    def check(self, shape: tuple[int, ...], inputs: int) -> None:
        """Raise ValueError unless x of this shape fits weights with this number of inputs."""


@dataclass(frozen=True)
class Dense(LinearMap):
    """A matrix on the last dimension."""

    def apply(self, x: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
        return functional.linear(x, U, b)

    def adjoint(self, h: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
        return functional.linear(h, U.T, b)

    def spread(self, vector: Tensor) -> Tensor:
        return vector

    @property
    def dims(self) -> int:
        return 1

    def outputs(self, shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
        return (channels,)

    def check(self, shape: tuple[int, ...], inputs: int) -> None:
        if not shape or shape[-1] != inputs:
            raise ValueError(f"expected {inputs} features in the last dimension of x, got {shape}")


@dataclass(frozen=True, kw_only=True)
class Convolution(LinearMap):
    """A k × k convolution of (batch, channels, height, width).

    Args:
        kernel_size: k.
        padding: pixels of zeros on each side; k // 2 where circular.
        circular: the image is a torus, the output has its size.
        stride: of the output; 1 where circular.

    Raises:
        ValueError: for sizes that are not positive, padding beyond k − 1, or stride or padding
            with a circular image.
    """

    kernel_size: int
    padding: int
    circular: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "padding"):
            object.__setattr__(self, name, integer(name, getattr(self, name), least=None))
        if self.kernel_size < 1 or self.stride < 1:
            raise ValueError(
                "kernel_size and stride must be at least 1, "
                f"got {self.kernel_size} and {self.stride}"
            )
        flag("circular", self.circular)
        if not 0 <= self.padding < self.kernel_size:
            raise ValueError(f"padding must lie in [0, {self.kernel_size - 1}], got {self.padding}")
        if self.circular and self.stride > 1:
            raise ValueError(
                "stride with circular padding is not supported: put InvertibleDownsampling before "
                "a convolution of stride 1"
            )
        if self.circular and self.padding != self.kernel_size // 2:
            raise ValueError(
                f"circular padding of a {self.kernel_size} × {self.kernel_size} kernel is "
                f"{self.kernel_size // 2}, got {self.padding}"
            )

    def apply(self, x: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
        if not self.circular:
            return functional.conv2d(x, U, b, stride=self.stride, padding=self.padding)
        return functional.conv2d(self._wrap(x, self.padding), U, b)

    def adjoint(self, h: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
        if not self.circular:
            return functional.conv_transpose2d(h, U, b, stride=self.stride, padding=self.padding)
        return functional.conv2d(self._wrap(h, self.kernel_size - 1 - self.padding), mirror(U), b)

    def _wrap(self, x: Tensor, before: int) -> Tensor:
        after = self.kernel_size - 1 - before
        return functional.pad(x, (before, after, before, after), mode="circular")

    def spread(self, vector: Tensor) -> Tensor:
        return taps(vector)

    @property
    def dims(self) -> int:
        return 3

    def outputs(self, shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
        _, height, width = shape
        if self.circular:
            return (channels, height, width)
        rows, columns = (
            (size + 2 * self.padding - self.kernel_size) // self.stride + 1
            for size in (height, width)
        )
        return (channels, rows, columns)

    def refuse_other_sums(self, U: Tensor) -> None:
        refuse_other_sums(U)

    def check(self, shape: tuple[int, ...], inputs: int) -> None:
        if len(shape) < 3 or shape[-3] != inputs:
            raise ValueError(
                f"expected images of {inputs} channels, (batch, {inputs}, height, width), "
                f"got {shape}"
            )
        if min(shape[-2:]) < self.kernel_size:
            raise ValueError(
                f"images of {shape[-2]} × {shape[-1]} pixels are smaller than the kernel "
                f"({self.kernel_size} × {self.kernel_size})"
            )


def taps(vector: Tensor) -> Tensor:
    """Return one number per channel, shaped to scale the pixels of images and kernels.

    Args:
        vector: one number per channel.
    """
    return vector[:, None, None]


def mirror(kernel: Tensor) -> Tensor:
    """Return the kernel of the adjoint convolution.

    Args:
        kernel: q × p × k × k.

    Returns:
        p × q × k × k.
    """
    return kernel.transpose(0, 1).flip(2, 3)


def refuse_other_sums(U: Tensor) -> None:
    """Refuse a kernel whose convolution may be summed in a way whose rounding is not bounded.

    Args:
        U: the kernel, on the device that runs.

    Raises:
        ValueError: naming the library and the cure.
    """
    if not precision.sums_plainly(U):
        library, cure = (
            ("cuDNN", "set torch.backends.cudnn.enabled = False, or move the model to the CPU")
            if U.is_cuda
            else ("NNPACK", "enable torch.backends.mkldnn, or use float64")
        )
        raise ValueError(
            f"{library} may run a convolution by Winograd's algorithm or by FFT, whose "
            f"rounding is not bounded: {cure}"
        )
