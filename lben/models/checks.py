"""Do the parts of a model's configuration belong together?"""

from __future__ import annotations

import math
from typing import Any

from lben.values import check_positive, conform
from lben.weights import check_gamma


def check_model(config: Any, *positive: str) -> None:
    """Make a configuration's values plain, and refuse images and classes that do not fit.

    Args:
        config: with shape, classes, mean and std.
        positive: names of its fields that must be above 0, or None.

    Raises:
        ValueError: naming the field, what it must be, and what was given.
    """
    conform(config)
    check_positive(config, "shape", "std", *positive)
    if hasattr(config, "gamma"):
        check_gamma(config.gamma)
    if config.classes < 2:
        raise ValueError(f"classes must be at least 2, got {config.classes}")
    channels = config.shape[0]
    for name in ("mean", "std"):
        numbers = getattr(config, name)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} must be finite, got {numbers}")
        if len(numbers) != channels:
            raise ValueError(
                f"{name} must have one number for each of the {channels} channels of shape "
                f"{config.shape}, got {len(numbers)}: {numbers}"
            )


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
