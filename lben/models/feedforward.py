"""Which feed-forward 1-Lipschitz networks have a name, and which bounds do they prove?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
from lben.models.base import Architecture, Classifier
from lben.models.configuration import Images, ImageTask, check_channels, check_kernel, fields_of
from lben.values import check_positive, conform

Block = Literal["sll", "cpl", "aol", "spectral", "sandwich"]
Head = Literal["rows", "orthonormal"]
Size = Literal["small", "medium", "large", "xlarge"]

# Araujo et al. (2023), Table 2: convolutions, dense layers, channels.
_PUBLISHED = {
    "small": (20, 7, 45), "medium": (30, 10, 60), "large": (50, 10, 90), "xlarge": (70, 15, 120),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FeedforwardArchitecture(Architecture):
    """A network whose every layer is 1-Lipschitz on the normalised image, whatever its images are.

    The image is down-sampled (if stem > 1), and zero channels are appended. Stages of convolutions
    follow, with invertible down-sampling between them, then pooling, dense layers and normalised
    logits. MaxMin follows each block that has no activation of its own (aol, spectral). With
    spectral blocks, linear and residual at the start, this is the plan of LiResNet (Hu et al.
    2023).

    Attributes:
        block: family of all layers: sll, cpl, aol, spectral or sandwich.
        stem: invertible down-sampling of the image before the first stage; 1 for none.
        channels: of each stage of convolutions.
        depths: convolutions of each stage.
        kernel_size: of the convolutions.
        conv_hidden: hidden channels of residual and sandwich convolutions.
        pool: size of the pooling after the last stage.
        dense_depth: dense layers.
        dense_hidden: hidden units of residual and sandwich dense layers.
        head: rows of the last layer, each normalised or orthonormal.
        core: hidden channels of a residual equilibrium convolution after the last stage, or 0.

    Example:
        >>> FeedforwardArchitecture(block="aol", channels=(32, 64), depths=(3, 3)).depths
        (3, 3)
    """

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
        conform(self)
        check_positive(self, "conv_hidden", "dense_hidden")
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

    @property
    def supports(self) -> frozenset[str]:
        return frozenset({"channels_last"} if self.core else {"channels_last", "autocast"})

    def for_data(self, data: Images) -> FeedforwardClassifierConfig:
        """Return the configuration of a classifier of such images, shifted by their mean only."""
        task = {**fields_of(ImageTask, data), "std": (1.0,) * len(data.mean)}
        return FeedforwardClassifierConfig(**fields_of(FeedforwardArchitecture, self), **task)


@dataclass(frozen=True, kw_only=True)
class FeedforwardClassifierConfig(FeedforwardArchitecture, ImageTask):
    """A classifier of images in [0, 1] whose every layer is 1-Lipschitz on the normalised image.

    Its fields are those of `FeedforwardArchitecture` and `ImageTask`; its bound in pixels is
    1 / min(std).

    Example:
        >>> config = FeedforwardClassifierConfig(
        ...     shape=(1, 8, 8), classes=10, mean=(0.3,), std=(1.0,), channels=(4,), depths=(1,),
        ...     dense_depth=1, dense_hidden=8
        ... )
        >>> config.build()(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __post_init__(self) -> None:
        FeedforwardArchitecture.__post_init__(self)
        ImageTask.__post_init__(self)

    @property
    def architecture(self) -> FeedforwardArchitecture:
        """The part of the configuration that does not depend on the data."""
        return FeedforwardArchitecture(**fields_of(FeedforwardArchitecture, self))

    def build(self) -> FeedforwardClassifier:
        """Return a freshly initialised model."""
        return FeedforwardClassifier(self)


def published_architecture(size: Size) -> FeedforwardArchitecture:
    """Return SLL Small, Medium, Large or X-Large as published.

    3 × 3 convolutions with 5 hidden channels, 4 × 4 pooling, dense layers with 2048 hidden units,
    normalised rows.

    Args:
        size: small, medium, large or xlarge.

    Raises:
        ValueError: for another size.

    Reference:
        Araujo, Havens, Delattre, Allauzen and Hu (2023), Table 2 and section 4.

    Example:
        >>> published_architecture("medium").depths
        (30,)
    """
    if size not in _PUBLISHED:
        raise ValueError(f"size must be one of {', '.join(_PUBLISHED)}, got {size!r}")
    convolutions, dense, channels = _PUBLISHED[size]
    return FeedforwardArchitecture(
        block="sll", stem=1, channels=(channels,), depths=(convolutions,), kernel_size=3,
        conv_hidden=5, pool=4, dense_depth=dense, dense_hidden=2048, head="rows",
    )  # fmt: skip


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
