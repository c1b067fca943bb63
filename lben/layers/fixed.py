"""Which maps are 1-Lipschitz whatever their parameters? Padding, pooling, sorting, reflecting.

Each map is an isometry, an orthogonal projection or a contraction in l2, so its bound is exactly 1.
`rounding` bounds the error that floating point adds.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lben import precision
from lben.certificates import CertificateError, LipschitzCertificate
from lben.layers.bounded import RoundedModule
from lben.layers.fingerprint import fingerprint
from lben.layers.graphs import check_numbers
from lben.layers.lasting import Lasting, make_lasting
from lben.layers.roundoff import Signal
from lben.parameterizations.multipliers import power_of_two
from lben.weights.growth import Growth
from lben.weights.sizes import integer


class FixedMap(RoundedModule, Lasting):
    """A map that is 1-Lipschitz for every value of its parameters.

    `certificate` states the bound 1 for the classes of this file alone. A class that extends one of
    them may compute something else, and needs a certificate of its own.

    Example:
        >>> from lben import AveragePooling
        >>> AveragePooling(2).certificate().bound
        1.0
    """

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Return the certificate of the bound 1.

        Args:
            image: not read: the bound holds for images of every size.

        Raises:
            CertificateError: for a class of another module that has no certificate of its own.
        """
        if type(self).__module__ != __name__:
            raise CertificateError(
                f"{type(self).__name__} extends a map of lben, and what it computes is not known: "
                "give it a method certificate(image=None) of its own"
            )
        return LipschitzCertificate(
            bound=1.0, margin=None, fingerprint=fingerprint(self), dtype="any",
            method=f"{type(self).__name__} is 1-Lipschitz, whatever its parameters",
        )  # fmt: skip

    def check(self, certificate: LipschitzCertificate, x: Tensor) -> None:
        """Refuse a certificate of another map.

        Raises:
            CertificateError: if the fingerprint differs.
        """
        certificate.check_fingerprint(self.certificate().fingerprint)

    def count_roundings(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the error of the map in units in the last place of ‖x‖₂, and its operations.

        A map that only moves numbers has no error and no operations: (0, 0).
        """
        return 0, 0

    def rounding_growth(self, shape: tuple[int, ...], dtype: torch.dtype) -> Growth:
        """Return a bound of ‖fl(y) − y‖₂ that is affine in ‖x‖₂.

        Args:
            shape: of one sample.
            dtype: in which the map runs.

        Returns:
            The bound as a function of ‖x‖₂.

        Raises:
            ValueError: if the dtype is neither float32 nor float64; under autocast.
        """
        precision.refuse_autocast()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"rounding is bounded in float32 and float64, got {dtype}")
        units, operations = self.count_roundings(tuple(shape))
        if not operations:
            return Growth(0.0, 0.0)
        entries, info = math.prod(shape), torch.finfo(dtype)
        # Underflow costs an operation at most three times the smallest normal number, one of them
        # multiplied with an entry. The factor 8 covers how later operations enlarge this loss.
        lost = 8 * operations * info.tiny
        x = Signal.input(dtype).off(units * info.eps / 2, lost * math.sqrt(entries))
        return x.below(Growth(0.0, 4.0 * operations))


class FixedImageMap(FixedMap):
    """A fixed map of images: (channels, height, width) behind any number of batch dimensions."""

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """Three sizes, none of them given."""
        return (None, None, None)


class Flatten(FixedMap):
    """Images to features.

    Example:
        >>> import torch
        >>> from lben import Flatten
        >>> Flatten()(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 48])
    """

    def forward(self, x: Float[Tensor, batch * features]) -> Float[Tensor, "batch p"]:
        """Return the features."""
        check_numbers(x)
        if x.ndim < 2:
            raise ValueError(f"expected (batch, …), got {tuple(x.shape)}")
        return x.flatten(1)


class ChannelPadding(FixedImageMap):
    """Append channels of zeros: an isometry.

    Args:
        channels: after padding.

    Raises:
        ValueError: if channels is not positive.

    Example:
        >>> import torch
        >>> from lben import ChannelPadding
        >>> ChannelPadding(5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = integer("channels", channels)

    def forward(self, x: Float[Tensor, "*batch p h w"]) -> Float[Tensor, "*batch q h w"]:
        """Return the padded images.

        Raises:
            ValueError: if x has more than `channels` channels.
        """
        check_numbers(x)
        if x.ndim < 3 or x.shape[-3] > self.channels:
            raise ValueError(
                f"expected images of at most {self.channels} channels, got {tuple(x.shape)}"
            )
        return functional.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[-3]))

    def extra_repr(self) -> str:
        """Describe the map in `repr`."""
        return str(self.channels)


class InvertibleDownsampling(FixedImageMap):
    """Move s × s pixels into channels: a permutation (pixel unshuffle).

    Args:
        stride: s.

    Raises:
        ValueError: if stride is not positive.

    Example:
        >>> import torch
        >>> from lben import InvertibleDownsampling
        >>> InvertibleDownsampling(2)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 12, 2, 2])
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = integer("stride", stride)

    def forward(self, x: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch d i j"]:
        """Return images of s² times the channels and 1/s of the height and width."""
        _check_divisible(x, self.stride)
        return functional.pixel_unshuffle(x, self.stride)

    def extra_repr(self) -> str:
        """Describe the map in `repr`."""
        return str(self.stride)


class AveragePooling(FixedImageMap):
    """Sum of s × s pixels divided by s: orthonormal rows, so the norm is exactly 1.

    Araujo et al. (2023) use s = 4 between convolutions and dense layers.

    Args:
        size: s.

    Raises:
        ValueError: if size is not positive.

    Example:
        >>> import torch
        >>> from lben import AveragePooling
        >>> AveragePooling(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = integer("size", size)

    def forward(self, x: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c i j"]:
        """Return the pooled images."""
        _check_divisible(x, self.size)
        flat = x.reshape(-1, *x.shape[-3:]) if x.ndim > 4 else x
        y = functional.avg_pool2d(flat, self.size, divisor_override=self.size)
        return y.reshape(*x.shape[:-2], *y.shape[-2:])

    def count_roundings(self, shape: tuple[int, ...]) -> tuple[int, int]:
        # A sum of s² terms of norm ‖ |A| ‖₂ = 1, and a division.
        return self.size**2 + 2, self.size**2 + 1

    def extra_repr(self) -> str:
        """Describe the map in `repr`."""
        return str(self.size)


class NormPooling(FixedImageMap):
    """l2 norm of s × s pixels: 1-Lipschitz by the triangle inequality (Boureau et al. 2010).

    Args:
        size: s.

    Raises:
        ValueError: if size is not positive.

    Example:
        >>> import torch
        >>> from lben import NormPooling
        >>> NormPooling(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = integer("size", size)

    def forward(self, x: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c i j"]:
        """Return the pooled images; where all pixels are 0 the gradient is 0."""
        _check_divisible(x, self.size)
        patches = functional.pixel_unshuffle(x, self.size).unflatten(-3, (x.shape[-3], -1))
        # In units of a power of two near the largest pixel no square overflows or vanishes.
        unit = power_of_two(patches.detach().abs().amax(-3, keepdim=True) / 2)
        return torch.linalg.vector_norm(patches / unit, dim=-3) * unit.squeeze(-3)

    def count_roundings(self, shape: tuple[int, ...]) -> tuple[int, int]:
        # s² products and sums below a root, and the smaller squares that underflow.
        return self.size**2 + 8, self.size**2 + 4

    def extra_repr(self) -> str:
        """Describe the map in `repr`."""
        return str(self.size)


class GroupSort(FixedMap):
    """Sort channels within groups: a permutation that depends on x. Anil, Lucas and Grosse (2019).

    Args:
        group: channels per group; 2 is MaxMin.

    Raises:
        ValueError: if group is below 2.

    Example:
        >>> import torch
        >>> from lben import GroupSort
        >>> GroupSort(2)(torch.tensor([[3.0, 1.0, 2.0, 5.0]]))
        tensor([[1., 3., 2., 5.]])
    """

    def __init__(self, group: int = 2) -> None:
        super().__init__()
        self.group = integer("group", group, least=2)

    def forward(self, x: Float[Tensor, "batch c *grid"]) -> Float[Tensor, "batch c *grid"]:
        """Return x with its channels sorted."""
        grouped = _groups(x, self.group)
        if self.group == 2:
            low, high = torch.minimum(*grouped.unbind(2)), torch.maximum(*grouped.unbind(2))
            return torch.stack([low, high], dim=2).flatten(1, 2)
        return grouped.sort(dim=2).values.flatten(1, 2)

    def count_roundings(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return 0, 1  # a comparison may take denormal numbers for zeros

    def extra_repr(self) -> str:
        """Describe the map in `repr`."""
        return str(self.group)


class Householder(FixedMap):
    """Reflect pairs of channels (a, b) where they lie on the far side of a trained line.

    With the line's normal (sin ½θ, −cos ½θ) the pair is reflected if the inner product is positive:
    piecewise orthogonal and continuous. Singla, Singla and Feizi (2022).

    Args:
        channels: even.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if channels is odd or not positive.

    Example:
        >>> import torch
        >>> from lben import Householder
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(Householder(4)(x).norm(dim=1), x.norm(dim=1))
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = integer("channels", channels, least=0)
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be even and positive, got {channels}")
        start = torch.full((channels // 2,), math.pi / 2, device=device, dtype=dtype)
        self.theta = nn.Parameter(start)
        make_lasting(self)

    def forward(self, x: Float[Tensor, "batch c *grid"]) -> Float[Tensor, "batch c *grid"]:
        """Return the reflected channels."""
        check_numbers(x, self.theta.dtype)
        if x.ndim < 2 or x.shape[1] != 2 * len(self.theta):
            raise ValueError(f"expected {2 * len(self.theta)} channels, got {tuple(x.shape)}")
        a, b = _groups(x, 2).unbind(2)
        theta = self.theta.reshape(-1, *[1] * (x.ndim - 2))
        across = torch.sin(theta / 2) * a - torch.cos(theta / 2) * b
        beyond = 2 * torch.relu(across)
        pair = (a - beyond * torch.sin(theta / 2), b + beyond * torch.cos(theta / 2))
        return torch.stack(pair, dim=2).flatten(1, 2)

    def count_roundings(self, shape: tuple[int, ...]) -> tuple[int, int]:
        # With s = sin ½θ and c = cos ½θ within 8u: sa − cb is within 17u‖(a, b)‖, twice that within
        # 34u, its products with s and c within (34|s| + 18)u and (34|c| + 18)u, and the sums within
        # 3u more: (34 + 21√2)u of the pair in all.
        return 80, 16


def _check_divisible(x: Tensor, size: int) -> None:
    check_numbers(x)
    if x.ndim < 3 or x.shape[-2] % size or x.shape[-1] % size:
        raise ValueError(
            f"expected images whose height and width are multiples of {size}, got {tuple(x.shape)}"
        )


def _groups(x: Tensor, group: int) -> Tensor:
    check_numbers(x)
    if x.ndim < 2 or x.shape[1] % group:
        raise ValueError(
            f"expected a number of channels that is a multiple of {group}, got {tuple(x.shape)}"
        )
    return x.unflatten(1, (-1, group))
