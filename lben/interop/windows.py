"""Which entries does a window of a convolution or of a pooling cover? Places, axis by axis.

An axis of windows is an array positions × taps of places on that axis, −1 in the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lben.interop.maps import ConversionError, Indices
from lben.rigorous import Array


def slide(
    size: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    ceil: bool = False,
) -> Indices:
    """Return the places that windows of one size cover, with padding before and after.

    Args:
        size: of the axis.
        kernel: taps of a window.
        stride: between windows.
        padding: before and after.
        dilation: between taps.
        ceil: whether a last window may reach beyond the padding, as torch's ceil_mode.

    Returns:
        positions × kernel.

    Raises:
        ConversionError: if no window fits.
    """
    room = size + sum(padding) - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil else room // stride) + 1
    if ceil and (count - 1) * stride >= size + padding[0]:
        count -= 1  # a window that starts in the padding is left out
    if count < 1:
        raise ConversionError(
            f"a window of {kernel} taps does not fit an axis of {size} with padding {padding}"
        )
    starts = np.arange(count)[:, None] * stride - padding[0]
    places = starts + np.arange(kernel) * dilation
    return np.where((places >= 0) & (places < size), places, -1)


def count_taps(
    size: int, kernel: int, positions: int, *, stride: int, padding: tuple[int, int]
) -> Indices:
    """Return how many taps of each window lie on an axis or in its padding."""
    starts = np.arange(positions) * stride - padding[0]
    return np.minimum(starts + kernel, size + padding[1]) - starts


def count_padded(counts: Sequence[Indices]) -> Array:
    """Return how many entries each window of a grid has, from the taps of every axis."""
    whole = np.ones(1)
    for count in counts:
        whole = np.multiply.outer(whole, count).ravel()
    return whole


def adapt(size: int, outputs: int) -> Indices:
    """Return the places of torch's adaptive pooling; a short window is filled with −1."""
    starts = np.arange(outputs) * size // outputs
    ends = -(-(np.arange(1, outputs + 1) * size) // outputs)
    places = starts[:, None] + np.arange(np.max(ends - starts))
    return np.where(places < ends[:, None], places, -1)


def cover(axes: Sequence[Indices], sizes: Sequence[int]) -> Indices:
    """Return the places of windows of several axes in the flattened grid.

    Args:
        axes: positions × taps, of every axis.
        sizes: of the axes.

    Returns:
        all positions × all taps, in C order.
    """
    rank = len(axes)
    whole = np.zeros((1,) * (2 * rank), dtype=np.int64)
    outside = np.zeros((1,) * (2 * rank), dtype=bool)
    for axis, places in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = places.shape
        spread = places.reshape(shape)
        whole = whole + spread * math.prod(sizes[axis + 1 :])
        outside = outside | (spread < 0)
    positions = math.prod(len(places) for places in axes)
    return np.where(outside, -1, whole).reshape(positions, -1)
