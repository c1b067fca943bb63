"""How is an orthogonal convolution of a torus evaluated?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lben.certificates import Certificate
from lben.layers.explicit import ExplicitLayer
from lben.layers.maps import Convolution
from lben.parameterizations.orthogonal import CayleyConvolution


class OrthogonalConv2d(ExplicitLayer):
    """y = Q ∗ x + b with circular padding and orthonormal Q, by the Cayley transform.

    Trockman and Kolter (2021). The transform is that of one image size, and products are made per
    frequency, in the precision of the parameters also under autocast.

    Args:
        in_channels: p.
        out_channels: q.
        kernel_size: k of the free kernel.
        image: height and width.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive, or the image smaller than the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        image: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        super().__init__(
            CayleyConvolution(shape, image, device=device, dtype=dtype),
            Convolution(kernel_size=kernel_size, padding=kernel_size // 2, circular=True),
            in_channels,
        )
        self.image = tuple(image)

    def certificate(
        self, image: tuple[int, int] | None = None, *, run: torch.dtype | None = None
    ) -> Certificate:
        """Prove the bound, for images of the layer's own size.

        Raises:
            ValueError: for another size.
            CertificateError: if the proof fails.
        """
        if image is not None and tuple(image) != self.image:
            raise ValueError(f"the layer was made for images of {self.image}, got {tuple(image)}")
        return super().certificate((self.image[0], self.image[1]), run=run)

    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        if tuple(x.shape[-2:]) != self.image:
            raise ValueError(
                f"the layer was made for images of {self.image[0]} × {self.image[1]} pixels, "
                f"got {x.shape[-2]} × {x.shape[-1]}"
            )
        Q, b, s = tensors
        X = torch.fft.rfft2(x.to(b.dtype) * s.to(b.dtype)).movedim(-3, -1)[..., None]
        y = (Q.to(X.dtype) @ X)[..., 0].movedim(-1, -3)
        return (torch.fft.irfft2(y, s=self.image) + b[:, None, None]).to(x.dtype)

    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        Q, b, _ = tensors
        # Two transforms of log n stages each, and a complex product of p terms per frequency.
        terms = 8 * math.log2(max(pixels, 2)) + 4 * Q.shape[-1]
        return terms * size * min(Q.shape[-2:]) ** 0.5 + b.norm() * pixels**0.5
