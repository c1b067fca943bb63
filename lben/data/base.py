"""What is a data set? Images and labels for training and test, with their statistics."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lben.values import conform


class DataError(Exception):
    """A data file is missing, truncated or corrupt, or the package that reads it is missing.

    Example:
        >>> from lben.data import load
        >>> load("mnist")
        Traceback (most recent call last):
        ...
        lben.data.base.DataError: mnist is read from files: give the folder that holds them (--root)
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of one data set with its fixed train and test split; also one of your own.

    `Dataset.from_tensors` makes one of images and labels and computes the other attributes. `train`
    accepts it.

    Attributes:
        name: of the data set.
        train_images, test_images: uint8, samples × channels × height × width.
        train_labels, test_labels: in [0, classes); integers of any type, kept as int64.
        classes: number of classes.
        mean, std: per channel, of pixels scaled to [0, 1], on the training images.

    Raises:
        ValueError: naming what does not fit.

    Example:
        >>> images, labels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3
        >>> data = Dataset(
        ...     name="mine", train_images=images, train_labels=labels, test_images=images,
        ...     test_labels=labels, classes=3, mean=(0.3,), std=(0.2,)
        ... )
        >>> data.shape
        (1, 4, 4)
    """

    name: str
    train_images: UInt8[Tensor, "n c h w"]
    train_labels: Int[Tensor, " n"]
    test_images: UInt8[Tensor, "m c h w"]
    test_labels: Int[Tensor, " m"]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        conform(self)
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_images(f"{part}_images", images)
            labels = _integers(f"{part}_labels", labels, len(images))
            _check_range(f"{part}_labels", labels, self.classes)
            object.__setattr__(self, f"{part}_labels", labels)
        if self.test_images.shape[1:] != self.train_images.shape[1:]:
            raise ValueError(
                f"train_images are {tuple(self.train_images.shape[1:])}, "
                f"test_images {tuple(self.test_images.shape[1:])}: they must have one shape"
            )
        for name in ("mean", "std"):
            numbers, channels = getattr(self, name), self.train_images.shape[1]
            if len(numbers) != channels or not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"{name} must be one finite number for each of {channels} channels, "
                    f"got {numbers}"
                )
        if not min(self.std) > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @classmethod
    def from_tensors(
        cls,
        train_images: UInt8[Tensor, "n c h w"],
        train_labels: Int[Tensor, " n"],
        test_images: UInt8[Tensor, "m c h w"],
        test_labels: Int[Tensor, " m"],
        *,
        name: str = "own",
        classes: int | None = None,
    ) -> Self:
        """Return a data set of your own: mean and std are those of the training images.

        Args:
            train_images, test_images: uint8, values from 0 to 255.
            train_labels, test_labels: integers from 0.
            name: of the data set, as reports and progress say it.
            classes: number of classes; one more than the largest training label when None.

        Raises:
            ValueError: naming what does not fit, or a channel that is constant or a part without
                images, which have no standard deviation.

        Example:
            >>> images = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4)
            >>> labels = torch.tensor([0, 1])
            >>> data = Dataset.from_tensors(images, labels, images, labels)
            >>> data.classes, round(data.mean[0] * 255, 6), round(data.std[0] * 255, 4)
            (2, 15.5, 9.3808)
        """
        _check_images("train_images", train_images)
        mean, std = _statistics(train_images)
        for channel, number in enumerate(std.tolist()):
            if not number > 0:
                raise ValueError(
                    f"channel {channel} of train_images ({tuple(train_images.shape)}) has no "
                    "standard deviation: it is constant or there are no images. Leave the channel "
                    "out, or give mean and std to Dataset(...)"
                )
        if classes is None:
            train = _integers("train_labels", train_labels, len(train_images))
            classes = 1 + int(train.max())
        return cls(
            name=name,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            classes=classes,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.train_images.shape[1:]
        return (c, h, w)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of images, labels and statistics; the name is left out."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        shapes = [tuple(t.shape) for t in tensors]
        found = hashlib.sha256(repr((shapes, self.classes, self.mean, self.std)).encode())
        for tensor in tensors:
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()


def pixels(images: UInt8[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images scaled to [0, 1].

    Args:
        images: uint8, values from 0 to 255.
        dtype: of what is returned.

    Returns:
        images / 255, of the same shape.

    Raises:
        ValueError: unless they are uint8.

    Example:
        >>> pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"pixels scales uint8 images to [0, 1], got {images.dtype}: floats in [0, 1] are pixels"
        )
    return images.to(dtype) / 255


def _statistics(
    images: UInt8[Tensor, "n c h w"],
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Return mean and standard deviation of every channel in [0, 1], from counts of each value.

    So no floating-point copy of the images is made. The deviation divides by n − 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    flat = images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in flat]).cpu()
    number = counts.sum(1)
    mean = (counts * values).sum(1) / number
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / (number - 1)
    return mean, variance.sqrt()


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{name} must be a uint8 Tensor with values from 0 to 255, got {kind}: make one of "
            "floats in [0, 1] by x.mul(255).round().to(torch.uint8), of an array by "
            "torch.from_numpy"
        )
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"{name} must be samples × channels × height × width, got {tuple(images.shape)}"
        )


def _integers(name: str, labels: Tensor, samples: int) -> Int[Tensor, " samples"]:
    """Return labels as int64, one per sample."""
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.shape != (samples,):
        kind = (
            f"{tuple(labels.shape)} {labels.dtype}"
            if isinstance(labels, Tensor)
            else repr(type(labels).__name__)
        )
        raise ValueError(f"{name} must be a Tensor of {samples} integers, got {kind}")
    return labels.to(torch.int64)


def _check_range(name: str, labels: Int[Tensor, " n"], classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{name} must lie in [0, {classes}), got values from {int(labels.min())} to "
            f"{int(labels.max())}"
        )
