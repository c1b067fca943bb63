"""What does the Fourier transform do to images on a torus, and to convolutions of them?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional

from solvers.activations import Step
from solvers.native import spectral


@dataclass(frozen=True)
class Torus:
    """Images of c channels, flattened.

    A convolution is one c × c matrix per frequency, its symbol; images and kernels are real, so
    half of the frequencies are enough.

    Args:
        channels: c.
        height, width: of the image.

    Example:
        >>> import torch
        >>> from solvers.operators import Torus
        >>> torus = Torus(2, 3, 4)
        >>> torus.n, torus.spectrum(torch.ones(5, torus.n)).shape  # 3 × 3 of 3 × 4 frequencies
        (24, torch.Size([9, 2, 5]))
    """

    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Per channel."""
        return self.height * self.width

    @property
    def n(self) -> int:
        """Units."""
        return self.channels * self.pixels

    def images(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "batch c h w"]:
        """Return samples as images, all batch dimensions merged."""
        return z.reshape(-1, self.channels, self.height, self.width)

    def multiply(
        self, symbols: Complex[Tensor, "f c c"], z: Float[Tensor, "*batch n"]
    ) -> Float[Tensor, "*batch n"]:
        """Return the convolution with these symbols of z."""
        half = torch.fft.rfft2(self.images(z), norm="ortho")
        product = spectral.product(symbols, half.flatten(2)).reshape(half.shape)
        size = (self.height, self.width)
        return torch.fft.irfft2(product, s=size, norm="ortho").reshape(z.shape)

    def spectrum(self, z: Float[Tensor, "*batch n"]) -> Complex[Tensor, "f c batch"]:
        """Return the half spectrum of samples, scaled to preserve norms, frequencies first."""
        half = torch.fft.rfft2(self.images(z), norm="ortho").flatten(2)
        return half.permute(2, 1, 0).contiguous()  # a product in another order is copied piecewise

    def synthesis(
        self, Z: Complex[Tensor, "f c batch"], shape: torch.Size
    ) -> Float[Tensor, "*batch n"]:
        """Return the samples of a half spectrum, in a shape."""
        half = Z.permute(2, 1, 0).reshape(-1, self.channels, self.height, self.width // 2 + 1)
        return torch.fft.irfft2(half, s=(self.height, self.width), norm="ortho").reshape(shape)

    def convolve(
        self, z: Float[Tensor, "*batch n"], kernel: Float[Tensor, "c c k k"]
    ) -> Float[Tensor, "*batch n"]:
        """Return Σ K[·, j, t] z[j, s + t − ⌊k/2⌋] by a direct convolution."""
        return functional.conv2d(self.padded(z, kernel), kernel).reshape(z.shape)

    def padded(self, z: Tensor, kernel: Tensor) -> Tensor:
        """Return images continued over their edges as far as a kernel reaches."""
        reach = kernel.shape[-1] // 2
        return functional.pad(self.images(z), (reach, reach, reach, reach), mode="circular")

    def symbols(self, kernel: Float[Tensor, "i j k k"]) -> Complex[Tensor, "f i j"]:
        """Return the symbol Σₜ K[·, ·, t] exp(iω·(t − ⌊k/2⌋)) at each of the half frequencies."""
        taps = kernel.flatten(2).permute(2, 0, 1).flatten(1)
        cos, sin = self._phases(kernel)
        symbols = torch.complex(cos @ taps, sin @ taps)
        return symbols.unflatten(1, kernel.shape[:2])

    def correlation(
        self, u: Tensor, z: Tensor, kernel: Float[Tensor, "c c k k"]
    ) -> Float[Tensor, "c c k k"]:
        """Return the gradient of Σ ⟨u, K ∗ z⟩ in K: what `symbols` is to products."""
        product = self.spectrum(u) @ self.spectrum(z).mH
        cos, sin = self._phases(kernel)
        weight = self.multiplicity(cos)[:, None]
        real, imaginary = product.real.flatten(1), product.imag.flatten(1)
        taps = (cos * weight).T @ real + (sin * weight).T @ imaginary
        return taps.T.reshape(kernel.shape)

    def multiplicity(self, like: Tensor) -> Float[Tensor, " f"]:
        """Return how many frequencies of the torus each of the half spectrum stands for."""
        count = torch.full((self.width // 2 + 1,), 2.0, dtype=like.dtype, device=like.device)
        count[0] = 1.0
        if self.width % 2 == 0:
            count[-1] = 1.0
        return count.repeat(self.height)

    def _phases(self, kernel: Tensor) -> tuple[Float[Tensor, "f taps"], Float[Tensor, "f taps"]]:
        """Return cos and sin of ω·(t − ⌊k/2⌋)."""
        k, device = kernel.shape[-1], kernel.device

        def angles(frequencies: int, size: int) -> Tensor:
            offset = torch.arange(k, device=device, dtype=torch.float64) - k // 2
            index = torch.arange(frequencies, device=device, dtype=torch.float64)
            return torch.outer(index, offset).remainder(size) * (2 * math.pi / size)

        rows, columns = angles(self.height, self.height), angles(self.width // 2 + 1, self.width)
        angle = rows[:, None, :, None] + columns[None, :, None, :]
        angle = angle.reshape(-1, k * k)
        return angle.cos().to(kernel.dtype), angle.sin().to(kernel.dtype)

    def per_channel(self, step: Step) -> Step:
        """Return one number per channel from one per unit; a single number as it is.

        Raises:
            ValueError: if units of a channel differ: the Fourier transform needs them equal.
        """
        if not (isinstance(step, Tensor) and step.ndim):
            return step
        grouped = step.reshape(self.channels, -1)
        if not bool((grouped == grouped[:, :1]).all()):
            raise ValueError("step sizes of a convolution must be equal within each channel")
        return grouped[:, 0]
