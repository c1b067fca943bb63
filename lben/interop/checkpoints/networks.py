"""Which feed-forward network with ReLU does a checkpoint hold? The digits and chains of GLipSDP."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lben.interop.checkpoints.files import Tensors
from lben.interop.pytorch import from_torch
from lben.weights.network import Network

FlattenOrder = Literal["channels_first", "channels_last"]


class Standardisation(nn.Module):
    """x ↦ (x − mean)/scale.

    Args:
        mean, scale: of the shape of one x.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised numbers."""
        return (x - self.mean) / self.scale


@torch.no_grad()
def read_glipsdp(
    tensors: Tensors,
    *,
    flatten_order: FlattenOrder = "channels_first",
    standardised: bool = True,
) -> Network:
    """Return a network of GLipSDP on digits, or one of its chains of square matrices.

    `i.weight` is a matrix, or the 3 × 3 kernel of a convolution with padding 1. ReLU stands between
    any two layers. The published figures of the digits are for the standardised input. Those of the
    convolutional ones are for channels_last, the order in which the published script flattened:
    column after column, and the channels of each pixel next to each other.
    """
    if flatten_order not in ("channels_first", "channels_last"):
        raise ValueError(
            f"flatten_order must be channels_first or channels_last, got {flatten_order!r}"
        )
    shape = _input_shape(tensors)
    channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    layers: list[nn.Module] = []
    count = 0
    while (name := f"{count}.weight") in tensors:
        layers += [nn.ReLU()] if layers else []
        if len(tensors.shape(name)) == 4:
            weight = tensors.take(name, None, channels, 3, 3)
            layer: nn.Module = nn.Conv2d(channels, len(weight), 3, padding=1, bias=False)
        else:
            weight = tensors.take(name, None, channels * height * width)
            if flatten_order == "channels_last":
                columns = weight.unflatten(1, (width, height, channels))
                weight = columns.permute(0, 3, 2, 1).flatten(1)
            layers += [nn.Flatten()]
            layer, height, width = nn.Linear(weight.shape[1], len(weight), bias=False), 1, 1
        channels = len(weight)
        layer.weight = nn.Parameter(weight)
        if (name := f"{count}.bias") in tensors:
            layer.bias = nn.Parameter(tensors.take(name, channels))
        layers.append(layer)
        count += 1
    size = math.prod(shape)
    known = [tensors.take(name, size) for name in _STATISTICS if name in tensors]
    tensors.finish()
    if not standardised:
        layers.insert(0, _standardisation(known, shape))
    return from_torch(nn.Sequential(*layers), shape)


_STATISTICS = ("input_mean", "input_scale")


def _standardisation(known: list[Tensor], shape: tuple[int, ...]) -> Standardisation:
    if len(known) != len(_STATISTICS):
        raise ValueError(
            "standardised=False asks for a network of raw pixels, and the file has no input_mean "
            "and input_scale"
        )
    mean, scale = (value.reshape(shape) for value in known)
    if not bool((scale > 0).all()):
        raise ValueError("input_scale must be positive: the file is damaged")
    return Standardisation(mean, scale)


def _input_shape(tensors: Tensors) -> tuple[int, ...]:
    """Return the shape of one input: a square image before a convolution, a vector otherwise."""
    first = tensors.shape("0.weight")
    if len(first) != 4:
        return (math.prod(first[1:]),)
    inputs = math.prod(tensors.shape("input_mean"))
    side = math.isqrt(inputs // first[1])
    if first[1] * side * side != inputs:
        raise ValueError(
            f"input_mean has {inputs} numbers, which are no square image of {first[1]} channels, "
            "as 0.weight reads it: the file is of another network"
        )
    return first[1], side, side
