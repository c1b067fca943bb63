"""Where do images and the states of a layer of images lie? Grid, torus, border and crop.

Note [Zero padding on a torus]
The Fourier transform does not diagonalize the resolvent of a zero-padded convolution. Therefore the
state gets a border that is at least as wide as W reaches. For a state that is zero on this border
the circular convolution equals the zero-padded one. An activation that is 0 on the border keeps the
state zero there. This activation is a proximal operator like every other (of slope 0). So the same
splitting, the same factors and the same certificate serve both paddings. The work grows by a factor
of about (1 + (k − 1)/height)².

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from solvers import Masked, ProximalActivation
from solvers.dependencies import must_not_cache


class ImageGeometry:
    """Images x of one size, and states on a torus that holds them.

    Args:
        image: height and width of x.
        stride: blocks of stride × stride pixels of x become channels first.
        circular: whether the down-sampled image is a torus; otherwise zeros surround it.
        state_channels: n.
        state_kernel: size of the kernel of W, odd.
        input_kernel: size of the kernel of U.

    Raises:
        ValueError: if the image is no multiple of the stride, or smaller than a kernel.

    Attributes:
        grid: height and width after down-sampling.
        torus: height and width of the states; equal to the grid if it is circular.

    Example:
        >>> geometry = ImageGeometry(
        ...     (8, 8), circular=False, state_channels=2, state_kernel=3, input_kernel=3
        ... )
        >>> geometry.torus
        (10, 10)
        >>> geometry.crop(geometry.embed(torch.ones(5, 2, 8, 8))).shape
        torch.Size([5, 2, 8, 8])
    """

    def __init__(
        self,
        image: tuple[int, int],
        *,
        stride: int = 1,
        circular: bool,
        state_channels: int,
        state_kernel: int,
        input_kernel: int,
    ) -> None:
        if min(image) < 1 or image[0] % stride or image[1] % stride:
            raise ValueError(
                f"images of {image[0]} × {image[1]} pixels do not divide into blocks of "
                f"{stride} × {stride}"
            )
        self.image, self.stride, self.circular = image, stride, circular
        self.grid = (image[0] // stride, image[1] // stride)
        name, needed = ("W", state_kernel) if circular else ("U", input_kernel)
        if min(self.grid) < needed:
            raise ValueError(
                f"images of {self.grid[0]} × {self.grid[1]} pixels (after down-sampling) are "
                f"smaller than the kernel of {name} ({needed} × {needed})"
            )
        border = 0 if circular else state_kernel // 2
        self.torus = self.grid
        if border:
            self.torus = (_round_up(self.grid[0] + border), _round_up(self.grid[1] + border))
        self._channels = state_channels

    def downsample(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch p i j"]:
        """Return x with blocks of pixels as channels."""
        return x if self.stride == 1 else functional.pixel_unshuffle(x, self.stride)

    def embed(self, image: Float[Tensor, "batch n i j"]) -> Float[Tensor, "batch units"]:
        """Return images on the grid as states: zero on the border, flattened."""
        below, right = (t - s for t, s in zip(self.torus, self.grid, strict=True))
        return functional.pad(image, (0, right, 0, below)).flatten(1)

    def crop(self, z: Float[Tensor, "*batch units"]) -> Float[Tensor, "*batch n i j"]:
        """Return states as images on the grid."""
        whole = z.unflatten(-1, (-1, *self.torus))
        return whole[..., : self.grid[0], : self.grid[1]]

    def restrict(self, activation: ProximalActivation, device: torch.device) -> ProximalActivation:
        """Return σ that is 0 on the border."""
        if self.circular:
            return activation
        mark = _mark_inside if must_not_cache() else _mark_inside_once
        return Masked(activation, mark(self._channels, self.torus, self.grid, device))


def _mark_inside(
    channels: int, torus: tuple[int, int], grid: tuple[int, int], device: torch.device
) -> Bool[Tensor, " units"]:
    """Return a mask of the units that lie inside the image and not on its border."""
    real = "cpu" if device.type == "meta" else device
    with torch.inference_mode(False):
        inside = torch.zeros(channels, *torus, dtype=torch.bool, device=real)
        inside[:, : grid[0], : grid[1]] = True
        return inside.flatten()


# The mask depends on sizes alone, so it is cached here, and not a buffer that moves with a layer.
_mark_inside_once = lru_cache(maxsize=32)(_mark_inside)


def _round_up(size: int) -> int:
    """Return the next even size whose Fourier transform is fast: prime factors 2, 3 and 5 only."""
    size += size % 2
    rest = size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return size if rest == 1 else _round_up(size + 2)
