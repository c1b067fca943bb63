"""Is an argument an integer, a flag, an image size or a real dtype? Checks return it or raise."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch


def integer(name: str, value: object, least: int | None = 1) -> int:
    """Return an integer argument as a Python int.

    Args:
        name: of the argument, for messages.
        value: what was given.
        least: the smallest value that is allowed, if there is one.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {value!r} ({type(value).__name__})"
        ) from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """Return an argument that is True or False.

    Args:
        name: of the argument, for messages.
        value: its value.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def image_size(value: object) -> tuple[int, int]:
    """Return the height and width of an image as Python ints.

    Args:
        value: the argument.

    Raises:
        TypeError: if it is no pair of integers.
        ValueError: if one is not positive.
    """
    if isinstance(value, str) or not isinstance(value, Iterable) or len(pair := [*value]) != 2:
        raise TypeError(f"an image size is a pair (height, width), got {value!r}")
    return integer("the height of an image", pair[0]), integer("the width of an image", pair[1])


def real(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of parameters, None for PyTorch's default.

    Args:
        dtype: the argument.

    Raises:
        TypeError: if it is no dtype of real floating-point numbers.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype must be one of real floating-point numbers, such as torch.float32, got {dtype}"
        )
    return dtype
