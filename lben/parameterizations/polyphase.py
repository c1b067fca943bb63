"""How do states of several resolutions become channels of one image?

A pixel of the coarsest grid covers f × f pixels of a scale with factor f. These pixels become f²
channels of the coarsest grid, in the order of torch.nn.PixelUnshuffle. Then every scale is an image
on that grid, and every convolution between scales, strided or not, is one of stride 1 between such
images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Polyphase:
    """The layout of several scales, each of half the resolution of the one before, on one grid.

    The input has the resolution of the finest scale.

    Args:
        in_channels: of the input.
        scales: channels of every scale, finest first.
        kernel_size: k of all convolutions, odd.
    """

    in_channels: int
    scales: tuple[int, ...]
    kernel_size: int

    @cached_property
    def factors(self) -> tuple[int, ...]:
        """f of every scale: its pixels along a side of a coarsest pixel."""
        return tuple(2**i for i in reversed(range(len(self.scales))))

    def spread(self, values: Float[Tensor, " channels"]) -> Float[Tensor, " n"]:
        """Return one number per channel of the coarsest grid from one per channel of a scale."""
        return values.repeat_interleave(self._counts(values), 0, output_size=self.units)

    def spread_channels(self, G: Float[Tensor, "q channels h w"]) -> Float[Tensor, "q n h w"]:
        """Return G with every channel repeated f² times, as `spread` repeats numbers."""
        return G.repeat_interleave(self._counts(G), 1, output_size=self.units)

    def sides(self, like: Tensor) -> Float[Tensor, " channels"]:
        """Return f of every channel of the scales."""
        return self._counts(like).to(like.dtype).sqrt()

    @property
    def units(self) -> int:
        """Channels of the coarsest grid."""
        return sum(n * f * f for n, f in zip(self.scales, self.factors, strict=True))

    def _counts(self, like: Tensor) -> Tensor:
        counts = [f * f for n, f in zip(self.scales, self.factors, strict=True) for _ in range(n)]
        return torch.tensor(counts, device=like.device)

    def input(self, U: Float[Tensor, "n p k k"]) -> Float[Tensor, "m r k k"]:
        """Return the kernel from the input to the state; it reaches the finest scale only."""
        fine = phases(U, self.factors[0], self.factors[0])
        rest = U.new_zeros(self.units - len(fine), *fine.shape[1:])
        return torch.cat([fine, rest]) if len(rest) else fine

    def state(self, kernels: Sequence[Tensor]) -> Float[Tensor, "n n k k"]:
        """Return the kernel of the convolution of the whole state.

        Args:
            kernels: of every scale to itself, then of every scale to the next coarser one.
        """
        count = len(self.scales)
        own, down = kernels[:count], kernels[count:]
        rows = []
        for i, n in enumerate(self.scales):
            row = []
            for j, m in enumerate(self.scales):
                to, of = self.factors[i], self.factors[j]
                if i == j:
                    row.append(phases(own[i], to, of))
                elif j == i - 1:
                    row.append(phases(down[j], to, of))
                else:
                    k = self.kernel_size
                    row.append(own[0].new_zeros(n * to * to, m * of * of, k, k))
            rows.append(torch.cat(row, 1))
        return torch.cat(rows)


def phases(kernel: Float[Tensor, "n m k k"], to: int, of: int) -> Float[Tensor, "n_to m_of k k"]:
    """Return a convolution of stride of/to as a kernel between images of the coarsest grid.

    The output pixel `to`·Y + r sees the input pixels of·Y + r·of/to + t − ⌊k/2⌋, t in [0, k).

    Args:
        kernel: with odd k.
        to, of: pixels of the output and of the input along a side of a coarsest pixel.
    """
    n, m, k, _ = kernel.shape
    if to == of == 1:
        return kernel
    table = _tap_table(k, to, of, kernel.device)  # to, of, k: which tap, or k where none
    index = table[:, None, :, None, :, None] * (k + 1) + table[None, :, None, :, None, :]
    padded = torch.nn.functional.pad(kernel, (0, 1, 0, 1)).flatten(2)
    image = padded[:, :, index.flatten()].reshape(n, m, to, to, of, of, k, k)
    image = image.permute(0, 2, 3, 1, 4, 5, 6, 7)
    return image.reshape(n * to * to, m * of * of, k, k)


def _tap_table(k: int, to: int, of: int, device: torch.device) -> Tensor:
    """Return the tap t with r·of/to + t − ⌊k/2⌋ = of·Y + p, at [r, p, Y + ⌊k/2⌋]; k where none."""
    table = torch.full((to, of, k), k, device="cpu")
    for r in range(to):
        for t in range(k):
            position = r * of // to + t - k // 2
            table[r, position % of, math.floor(position / of) + k // 2] = t
    return table.to(device)
