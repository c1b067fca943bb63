"""What is configured of a classifier, by whom? The task by the data, the architecture by its user.

An architecture and a task together are the configuration of one classifier, a frozen dataclass that
inherits the fields of both. A field is declared once; the command line and checkpoints find it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from lben.values import check_positive, conform


@runtime_checkable
class Images(Protocol):
    """What an architecture needs to know of data: a `Dataset` and an `ImageTask` say it."""

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
    """What the data decide of a classifier of images in [0, 1].

    Attributes:
        shape: channels, height, width.
        classes: number of classes.
        mean: per channel, subtracted from the pixels.
        std: per channel, divides them; a bound on the normalised input grows by 1 / min(std).

    Raises:
        ValueError: naming the field, what it must be, and what was given.
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
    """Return what a value has under the names of a dataclass's fields."""
    return {f.name: getattr(value, f.name) for f in fields(cls)}


def check_channels(channels: tuple[int, ...]) -> None:
    """Refuse a network without a stage, or a stage without channels.

    Raises:
        ValueError: naming them.
    """
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be positive numbers, one at least, got {channels}")


def check_kernel(kernel_size: int) -> None:
    """Refuse kernels without a centre.

    Raises:
        ValueError: naming the size.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
