"""Which feed-forward 1-Lipschitz networks have a name, and what do they prove?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lben.layers import (
    AOLConv2d,
    AOLLinear,
    AveragePooling,
    ChannelPadding,
    CPLConv2d,
    CPLLinear,
    EquilibriumConv2d,
    Flatten,
    GroupSort,
    InvertibleDownsampling,
    LipschitzSequential,
    NormalizedLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from lben.models.base import Classifier
from lben.models.checks import check_channels, check_kernel, check_model

Block = Literal["sll", "cpl", "aol", "spectral", "sandwich"]
Head = Literal["rows", "orthonormal"]
Size = Literal["small", "medium", "large", "xlarge"]

# Araujo et al. (2023), Table 2: convolutions, dense layers, channels.
_PUBLISHED = {
    "small": (20, 7, 45), "medium": (30, 10, 60), "large": (50, 10, 90), "xlarge": (70, 15, 120),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FeedforwardClassifierConfig:
    """A feed-forward network whose every layer is 1-Lipschitz on the normalised image.

    The image is down-sampled, if asked for, and zero channels are appended; then come stages of
    convolutions with invertible down-sampling between them, norm-preserving pooling, dense layers
    and normalised logits. Blocks without activation of their own (aol, spectral) are followed by
    MaxMin; with spectral blocks, linear and residual at the start, it is the plan of LiResNet (Hu
    et al. 2023).

    Attributes:
        shape: channels, height, width.
        classes: number of classes.
        mean: per channel, subtracted from the pixels.
        std: per channel, divides them; the bound in pixels is 1 / min(std).
        block: family of all layers.
        stem: invertible down-sampling of the image before the first stage; 1 for none.
        channels: of each stage.
        depths: convolutions of each stage.
        kernel_size: of the convolutions.
        conv_hidden: hidden channels of residual and sandwich convolutions.
        pool: size of the pooling after the last stage.
        dense_depth: dense layers.
        dense_hidden: hidden units of residual and sandwich dense layers.
        head: rows of the last layer, each normalised or orthonormal.
        core: hidden channels of a residual equilibrium convolution after the last stage, or 0.

    Example:
        >>> config = FeedforwardClassifierConfig(
        ...     shape=(3, 8, 8), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, channels=(6,),
        ...     depths=(2,), dense_depth=1, dense_hidden=16,
        ... )
        >>> len(config.build().stages)
        3
    """

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    block: Block = "sll"
    stem: int = 1
    channels: tuple[int, ...] = (45,)
    depths: tuple[int, ...] = (20,)
    kernel_size: int = 3
    conv_hidden: int = 5
    pool: int = 4
    dense_depth: int = 7
    dense_hidden: int = 2048
    head: Head = "rows"
    core: int = 0

    def __post_init__(self) -> None:
        check_model(self, "conv_hidden", "dense_hidden")
        check_kernel(self.kernel_size)
        if not self.channels or len(self.channels) != len(self.depths):
            raise ValueError(
                f"channels and depths need one number per stage, got {self.channels} "
                f"and {self.depths}"
            )
        if self.stem < 1 or self.pool < 1:
            raise ValueError(f"stem and pool must be at least 1, got {self.stem} and {self.pool}")
        check_channels(self.channels)
        if self.core < 0:
            raise ValueError(f"core must be at least 0, got {self.core}")
        if min(self.depths) < 0 or self.dense_depth < 0:
            raise ValueError(
                f"depths must be at least 0, got {self.depths} and dense_depth {self.dense_depth}"
            )

    def build(self) -> FeedforwardClassifier:
        """Return a freshly initialised model."""
        return FeedforwardClassifier(self)


def published_architecture(size: Size) -> dict[str, Any]:
    """Return the architecture of SLL Small, Medium, Large or X-Large as published.

    Araujo, Havens, Delattre, Allauzen and Hu (2023), Table 2 and section 4: 3 × 3 convolutions with
    5 hidden channels, 4 × 4 pooling, dense layers with 2048 hidden units, normalised rows.

    Example:
        >>> published_architecture("small")["channels"]
        (45,)
    """
    if size not in _PUBLISHED:
        raise ValueError(f"size must be one of {', '.join(_PUBLISHED)}, got {size!r}")
    convolutions, dense, channels = _PUBLISHED[size]
    return {
        "block": "sll", "stem": 1, "channels": (channels,), "depths": (convolutions,),
        "kernel_size": 3, "conv_hidden": 5, "pool": 4, "dense_depth": dense,
        "dense_hidden": 2048, "head": "rows",
    }  # fmt: skip


class FeedforwardClassifier(Classifier):
    """Normalisation, a chain of 1-Lipschitz layers and normalised logits.

    Example:
        >>> import torch
        >>> from lben import FeedforwardClassifierConfig
        >>> model = FeedforwardClassifierConfig(
        ...     shape=(3, 8, 8), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, channels=(6,),
        ...     depths=(2,), dense_depth=1, dense_hidden=16,
        ... ).build()
        >>> model(torch.rand(2, 3, 8, 8)).shape, len(model.certificate().pairs)
        (torch.Size([2, 10]), 10)
    """

    def __init__(self, config: FeedforwardClassifierConfig) -> None:
        super().__init__(config.shape, config.mean, config.std)
        self.config = config
        self.features = LipschitzSequential(*_features(config))
        with torch.no_grad():
            start = torch.zeros(1, *config.shape, device=self.normalize.mean.device)
            size = self.features(start).shape[1]
        self.head = NormalizedLinear(size, config.classes, kind=config.head)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.normalize, self.features, self.head

    @property
    def gamma(self) -> float | None:
        """‖Q‖₂ of the last layer, every other bound being 1."""
        return self.head.weights().gamma


def _features(config: FeedforwardClassifierConfig) -> Iterator[nn.Module]:
    channels, height, width = config.shape
    if config.stem > 1:
        yield InvertibleDownsampling(config.stem)
        channels *= config.stem**2
        height, width = height // config.stem, width // config.stem
    if channels < config.channels[0]:
        yield ChannelPadding(config.channels[0])
        channels = config.channels[0]
    for stage, (wanted, depth) in enumerate(zip(config.channels, config.depths, strict=True)):
        if stage:
            yield InvertibleDownsampling(2)
            channels, height, width = 4 * channels, height // 2, width // 2
        if channels != wanted:
            yield AOLConv2d(channels, wanted, 1)
            channels = wanted
        for _ in range(depth):
            yield from _convolution(config, channels)
    if config.core:
        yield EquilibriumConv2d(
            channels, config.core, channels, config.kernel_size, image=(height, width), skip=1.0
        )
    if config.pool > 1:
        yield AveragePooling(config.pool)
    yield Flatten()
    size = math.prod((channels, height // config.pool, width // config.pool))
    for _ in range(config.dense_depth):
        yield from _dense(config, size)


def _convolution(config: FeedforwardClassifierConfig, channels: int) -> Iterator[nn.Module]:
    k, hidden = config.kernel_size, config.conv_hidden
    if config.block == "sll":
        yield SLLConv2d(channels, hidden, k)
    elif config.block == "cpl":
        yield CPLConv2d(channels, hidden, k)
    elif config.block == "sandwich":
        yield SandwichConv2d(channels, channels, k, hidden_channels=hidden, squarings=1)
    else:
        kind = AOLConv2d if config.block == "aol" else SpectralConv2d
        yield kind(channels, channels, k)
        yield GroupSort(2)


def _dense(config: FeedforwardClassifierConfig, size: int) -> Iterator[nn.Module]:
    if config.block == "sll":
        yield SLLLinear(size, config.dense_hidden)
    elif config.block == "cpl":
        yield CPLLinear(size, config.dense_hidden)
    elif config.block == "sandwich":
        yield SandwichLinear(size, size, hidden_features=min(2 * size, config.dense_hidden))
    else:
        kind = AOLLinear if config.block == "aol" else SpectralLinear
        yield kind(size, size)
        yield GroupSort(2)
