"""Which feed-forward network with ReLU does a checkpoint hold? The digits and chains of GLipSDP."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import scipy.sparse
from torch import Tensor

from lben.interop.checkpoints.files import Tensors
from lben.rigorous import Array
from lben.weights.activation import RELU
from lben.weights.network import AffineMap, Block, Matrix, Network, is_sparse

FlattenOrder = Literal["channels_first", "channels_last"]


def read_glipsdp(
    tensors: Tensors,
    *,
    flatten_order: FlattenOrder = "channels_first",
    standardised: bool = True,
) -> Network:
    """Return a network of GLipSDP on digits, or one of its chains of square matrices.

    `i.weight` is a matrix, or the 3 × 3 kernel of a convolution with padding 1. ReLU stands between
    any two layers. The published figures of the digits are for the standardised input. Those of the
    convolutional ones are for channels_last, the order in which the published script flattened.
    """
    if flatten_order not in ("channels_first", "channels_last"):
        raise ValueError(
            f"flatten_order must be channels_first or channels_last, got {flatten_order!r}"
        )
    maps: list[AffineMap] = []
    channels, height, width = _input_shape(tensors)
    while (name := f"{len(maps)}.weight") in tensors:
        inputs = channels * height * width
        matrix: Matrix
        if len(tensors.shape(name)) == 4:
            kernel = tensors.take(name, None, channels, 3, 3)
            matrix, channels = convolution_matrix(kernel, (height, width)), len(kernel)
        else:
            weight = tensors.take(name, None, inputs)
            if flatten_order == "channels_last":
                weight = weight.unflatten(1, (height, width, channels)).movedim(3, 1).flatten(1)
            matrix, channels, height, width = weight.numpy(), len(weight), 1, 1
        bias = np.zeros(channels)
        if (name := f"{len(maps)}.bias") in tensors:
            bias = tensors.take(name, channels).numpy()
        maps.append(AffineMap.of({len(maps): matrix}, bias.repeat(height * width)))
    mean, scale = (_statistics(tensors, name, maps[0]) for name in ("input_mean", "input_scale"))
    tensors.finish()
    if not standardised:
        if mean is None or scale is None:
            raise ValueError(
                "standardised=False asks for a network of raw pixels, and the file has no "
                "input_mean and input_scale"
            )
        maps[0] = _on_raw_pixels(maps[0], mean, scale)
    blocks = tuple(Block(affine=affine, activation=RELU) for affine in maps[:-1])
    inputs = maps[0].matrices[0].shape[1]
    return Network(input_shape=(inputs,), blocks=blocks, output=maps[-1])


def convolution_matrix(kernel: Tensor, image: tuple[int, int]) -> scipy.sparse.csr_array:
    """Return the matrix of a 3 × 3 convolution with padding 1 on flattened images.

    Args:
        kernel: q × p × 3 × 3.
        image: height and width.

    Returns:
        (q · height · width) × (p · height · width), channels first.
    """
    (q, p), (height, width) = kernel.shape[:2], image
    o, c, i, j = np.indices(tuple(kernel.shape)).reshape(4, -1, 1)
    y, x = np.divmod(np.arange(height * width), width)
    row, column = y + i - 1, x + j - 1
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    rows = ((o * height + y) * width + x + 0 * row)[inside]
    columns = ((c * height + row) * width + column)[inside]
    values = np.broadcast_to(kernel.numpy().reshape(-1, 1), inside.shape)[inside]
    shape = (q * height * width, p * height * width)
    return scipy.sparse.csr_array((values, (rows, columns)), shape=shape)


def _input_shape(tensors: Tensors) -> tuple[int, int, int]:
    """Return channels, height and width of the input: square images before a convolution."""
    first = tensors.shape("0.weight")
    if len(first) != 4:
        return math.prod(first[1:]), 1, 1
    inputs = math.prod(tensors.shape("input_mean"))
    side = math.isqrt(inputs // first[1])
    if first[1] * side * side != inputs:
        raise ValueError(
            f"input_mean has {inputs} numbers, which are no square image of {first[1]} channels, "
            "as 0.weight reads it: the file is of another network"
        )
    return first[1], side, side


def _statistics(tensors: Tensors, name: str, first: AffineMap) -> Array | None:
    inputs = first.matrices[0].shape[1]
    return tensors.take(name, inputs).numpy() if name in tensors else None


def _on_raw_pixels(affine: AffineMap, mean: Array, scale: Array) -> AffineMap:
    """Return the map after x ↦ (x − mean)/scale; its numbers are rounded, see Note [Numbers]."""
    if not (scale > 0).all():
        raise ValueError("input_scale must be positive: the file is damaged")
    matrix, divide = affine.matrices[0], scipy.sparse.diags_array(1 / scale)
    scaled: Matrix = matrix @ divide if is_sparse(matrix) else matrix / scale
    return AffineMap(
        matrices={0: scaled}, bias=affine.bias - scaled @ mean, sizes={0: abs(scaled)},
        bias_size=np.abs(affine.bias) + abs(scaled) @ np.abs(mean),
        operations=len(mean) + 4, exact=False,
    )  # fmt: skip
