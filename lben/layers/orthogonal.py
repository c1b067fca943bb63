"""How is an orthogonal convolution on a torus evaluated? By one matrix per frequency."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lben.certificates import LayerCertificate
from lben.layers.bounded import refuse_other_image
from lben.layers.feedforward import FeedforwardLayer
from lben.layers.roundoff import Signal
from lben.parameterizations.orthogonal import CayleyConvolution
from lben.weights.growth import Growth, add_up, norm_up, norms_up, times_up
from lben.weights.linear_maps import Convolution


class OrthogonalConv2d(FeedforwardLayer):
    """y = Q ∗ x + b with circular padding and orthonormal Q, by the Cayley transform.

    Trockman and Kolter (2021). The Cayley transform is computed for one image size. Products are
    computed per frequency, in the precision of the parameters, also under autocast.

    Args:
        in_channels: p.
        out_channels: q.
        kernel_size: k of the free kernel.
        image: height and width.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive, or the image smaller than the kernel.

    Example:
        >>> import torch
        >>> from lben import OrthogonalConv2d
        >>> layer = OrthogonalConv2d(3, 4, image=(8, 8))
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
        >>> round(layer.certificate().bound, 4)
        1.0
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
        self.image = (image[0], image[1])

    def certificate(
        self, image: tuple[int, ...] | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> LayerCertificate:
        """Prove the bound, for images of the layer's own size.

        Raises:
            ValueError: for another size.
            CertificateError: if the proof fails.
        """
        refuse_other_image(image, self.image, "the layer")
        return super().certificate(self.image, compute_dtype=compute_dtype)

    def evaluate(
        self, x: Tensor, compute_dtype: torch.dtype, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        if tuple(x.shape[-2:]) != self.image:
            raise ValueError(
                f"the layer was made for images of {self.image[0]} × {self.image[1]} pixels, "
                f"got {x.shape[-2]} × {x.shape[-1]}"
            )
        Q, b, s = tensors
        X = torch.fft.rfft2(x.to(b.dtype) * s.to(b.dtype)).movedim(-3, -1)[..., None]
        y = (Q.to(X.dtype) @ X)[..., 0].movedim(-1, -3)
        return (torch.fft.irfft2(y, s=self.image) + b[:, None, None]).to(x.dtype)

    def _roundoff(self, x: Signal, tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> Growth:
        """Bound the rounding of two Fourier transforms and of a complex product per frequency.

        A transform of N points has a relative error of at most 16 (log₂N + 8) u in l2. This is on
        the safe side of Theorem 24.2 of Higham (2002), also for mixed radices and for Bluestein's
        algorithm.
        """
        Q, b, _ = tensors
        outputs, inputs = Q.shape[-2:]
        pixels = math.prod(self.image)
        unit = torch.finfo(x.dtype).eps / 2
        transform = 16 * (math.log2(pixels) + 8) * unit
        # Symbols of norm 1 have a Frobenius norm of at most √min(q, p).
        size = max(norms_up(torch.view_as_real(Q.resolve_conj()).flatten(2), 1).max().item(), 1.0)
        product = 4 * (inputs + 4) * unit * size
        # `weights()` transforms the kernel in float64; this is the norm of the error of its
        # entries.
        stored = 2.0**-48 * (math.log2(pixels) + 8) * size * math.sqrt(pixels * outputs * inputs)
        # Sums of up to `pixels` numbers; each may lose a few times the smallest normal number.
        lost = 64 * torch.finfo(x.dtype).tiny * (pixels * inputs + 4) * math.sqrt(pixels * outputs)
        bias = times_up(norm_up(b), math.sqrt(pixels))
        y = x.off(times_up(2, add_up(2 * transform, product, stored)), lost * (1 + size))
        y = replace(y, size=y.size.plus(bias))
        y = y.off(2 * unit)
        return y.below(Growth(0.0, 4.0 * pixels * size))
