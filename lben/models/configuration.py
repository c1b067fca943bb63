"""Who configures which part of a classifier? The data fix the task, the user the architecture.

The configuration of a classifier is a frozen dataclass that inherits the fields of an architecture
and of a task. Each field is declared once. The command line and checkpoints read it from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from lben.values import check_positive, conform


@runtime_checkable
class Images(Protocol):
    """The facts about data that an architecture needs; `Dataset` and `ImageTask` have them.

    Example:
        >>> images: Images = ImageTask(shape=(1, 28, 28), classes=10, mean=(0.13,), std=(0.31,))
        >>> images.shape
        (1, 28, 28)
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """The part of a classifier's configuration that the data fix, for images in [0, 1].

    Attributes:
        shape: channels, height, width.
        classes: number of classes.
        mean: per channel, subtracted from the pixels.
        std: per channel, divides them; a bound on the normalised input grows by 1 / min(std).

    Raises:
        ValueError: naming the field, what it must be, and what was given.

    Example:
        >>> ImageTask(shape=(1, 28, 28), classes=10, mean=(0.13,), std=(0.31,)).classes
        10
    """

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        conform(self)
        check_positive(self, "shape", "std")
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        channels = self.shape[0]
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} must be finite, got {numbers}")
            if len(numbers) != channels:
                raise ValueError(
                    f"{name} must have one number for each of the {channels} channels of shape "
                    f"{self.shape}, got {len(numbers)}: {numbers}"
                )


def fields_of(cls: type[Any], value: Any) -> dict[str, Any]:
    """Return a dictionary of the attributes of a value that are fields of a dataclass.

    Args:
        cls: the dataclass.
        value: an object with these attributes.
    """
    return {f.name: getattr(value, f.name) for f in fields(cls)}


def check_channels(channels: tuple[int, ...]) -> None:
    """Refuse a network without a stage, or a stage without channels.

    Args:
        channels: one number per stage.

    Raises:
        ValueError: naming them.
    """
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be positive numbers, one at least, got {channels}")


def check_kernel(kernel_size: int) -> None:
    """Refuse kernels without a centre.

    Args:
        kernel_size: height and width of the kernel.

    Raises:
        ValueError: naming the size.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
