"""How is a batch of uint8 images changed at random? Shifts, flips and colours, per sample.

All random numbers come from one CPU generator, so a seed gives the same changes on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from lben.data import pixels
from lben.values import conform


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of images, in this order; a change that is off draws no random numbers.

    1. shift, by whole pixels in both directions; 2. flip, left to right, every second image;
    then on pixels in [0, 1], clipped to it after each: 3. brightness x ↦ fx;
    4. contrast x ↦ fx + (1 − f)·(mean grey of the image); 5. saturation x ↦ fx + (1 − f)·grey;
    6. hue, turned by f of a full turn in HSV. Grey is 0.2989 R + 0.587 G + 0.114 B. The formulas
    are those that torchvision documents for `ColorJitter` (which shuffles 3 to 6).

    The published recipe of SLL on CIFAR-10 (Araujo et al. 2023) is shift 4, reflect, flip,
    brightness 0.1, contrast 0.5 to 2, saturation 0.3 to 2, hue 0.02.

    Attributes:
        shift: shift each image by up to this many pixels.
        reflect: fill what a shift uncovers by reflection, not by zeros.
        flip: mirror every second image.
        brightness: b, factors f from 1 − b to 1 + b.
        contrast: least and largest factor.
        saturation: least and largest factor.
        hue: largest turn to either side, as a part of a full turn.
    """

    shift: int = 0
    reflect: bool = False
    flip: bool = False
    brightness: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    saturation: tuple[float, float] = (1.0, 1.0)
    hue: float = 0.0

    def __post_init__(self) -> None:
        conform(self)
        if not 0 <= self.shift < math.inf:
            raise ValueError(f"shift must be at least 0, got {self.shift}")
        if self.reflect and not self.shift:
            raise ValueError("reflect fills what a shift uncovers: it needs a shift")
        for name, most in (("brightness", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most:g}], got {getattr(self, name)}")
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < math.inf:
                raise ValueError(f"{name} must be two factors 0 ≤ low ≤ high, got {(low, high)}")

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images that this augmentation has no meaning for.

        Args:
            shape: channels, height, width.

        Raises:
            ValueError: if colours of images without colours are to change, or a reflection is to
                reach beyond the image.
        """
        channels, *sides = shape
        changed = {
            "contrast": self.contrast != (1, 1) and channels != 1,
            "saturation": self.saturation != (1, 1),
            "hue": self.hue > 0,
        }
        for name, needs_colours in changed.items():
            if needs_colours and channels != 3:
                raise ValueError(f"{name} needs images of 3 channels, got {channels}: leave it out")
        if self.reflect and self.shift >= min(sides):
            raise ValueError(
                f"a shift by {self.shift} cannot reflect images of {sides[0]} × {sides[1]} pixels"
            )

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        """Return changed images as pixels in [0, 1].

        Args:
            images: on any device.
            generator: on the CPU; it advances with every draw.

        Returns:
            Pixels in [0, 1], float, of the same shape.

        Raises:
            ValueError: as `check` does.
        """
        n, channels, height, width = images.shape
        self.check((channels, height, width))

        def draw(low: float, high: float) -> Tensor:
            share = torch.rand(n, 1, 1, 1, generator=generator, device="cpu")
            return (low + (high - low) * share).to(images.device)

        images = random_shift(images, self.shift, generator, reflect=self.reflect)
        if self.flip:
            images = torch.where(draw(0, 1) < 0.5, images.flip(3), images)
        x = pixels(images)
        if self.brightness:
            x = (draw(1 - self.brightness, 1 + self.brightness) * x).clamp(0, 1)
        if self.contrast != (1, 1):
            x = _blend(x, grey(x).mean((2, 3), keepdim=True), draw(*self.contrast))
        if self.saturation != (1, 1):
            x = _blend(x, grey(x), draw(*self.saturation))
        if self.hue:
            x = turn_hue(x, draw(-self.hue, self.hue))
        return x


def random_shift(
    images: Tensor, most: int, generator: torch.Generator, *, reflect: bool = False
) -> Tensor:
    """Shift each image by up to `most` pixels in each direction, filling with zeros or a mirror.

    Args:
        images: batch × channels × height × width.
        most: pixels.
        generator: on the CPU.
        reflect: fill with a mirror, not with zeros.
    """
    if most == 0:
        return images
    n, _, height, width = images.shape
    offset = torch.randint(0, 2 * most + 1, (2, n), generator=generator, device="cpu")
    offset = offset.to(images.device)
    rows = offset[0][:, None] + torch.arange(height, device=images.device)
    columns = offset[1][:, None] + torch.arange(width, device=images.device)
    if reflect:
        rows, columns = _mirror(rows - most, height), _mirror(columns - most, width)
    else:
        images = functional.pad(images, (most, most, most, most))
    sample = torch.arange(n, device=images.device)[:, None, None]
    shifted = images.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()


def grey(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Return the luma of colour images (ITU-R BT.601), and grey images as they are.

    Args:
        x: images with any number of channels.
    """
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(
    x: Float[Tensor, "batch 3 height width"], turn: Float[Tensor, "batch 1 1 1"]
) -> Float[Tensor, "batch 3 height width"]:
    """Return the images with their hue turned, at the same value and saturation.

    With V the largest channel, C the largest minus the smallest and H the hue in sixths of a turn,
    channel c is V − C·clip(min(k, 4 − k), 0, 1) where k = (n_c + H) mod 6 and n = 5, 3, 1.

    Args:
        x: pixels in [0, 1].
        turn: part of a full turn, per image.

    Returns:
        Pixels in [0, 1] of the same shape.
    """
    red, green, blue = x.split(1, dim=1)
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))  # grey has no hue to turn
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    first = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device)[:, None, None]
    k = (first + hue + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _mirror(index: Tensor, size: int) -> Tensor:
    """Return indices reflected at 0 and size − 1; the edge pixels are not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()
