"""What is a module whose Lipschitz bound is proved, and whose error is bounded as it runs?

It has two methods: `certificate` and `forward_with_error`. Every map, layer, head, chain and
classifier of this package has them. A module that you wrote takes part in chains and classifiers
once it has them too.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.certificates import CertificateError, LipschitzCertificate
from lben.layers.hooks import refuse_hooks
from lben.radii.error_bounds import Affine, Certified
from lben.weights.growth import Growth, norms_up
from lben.weights.sizes import image_size

ErrorIn = Float[Tensor, "*batch"] | float
"""A bound of the l2 distance of an input to the exact one, per sample or of all."""

C_ = TypeVar("C_", bound=LipschitzCertificate)


@runtime_checkable
class BoundedModule(Protocol):
    """A torch.nn.Module with a proved bound.

    Example:
        >>> import torch
        >>> class Double(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x  # exact in floating point
        ...     def certificate(self, image=None):
        ...         return LipschitzCertificate(
        ...             bound=2.0, margin=None, fingerprint="2x", dtype="float32", method="by hand"
        ...         )
        ...     def forward_with_error(self, x, certificate, error_in=0.0):
        ...         exact = torch.zeros(len(x), dtype=torch.float64)
        ...         found = Certified(value=self(x), error=exact, uniform=Affine(exact, 0.0))
        ...         return found.after(error_in, certificate.bound)
        >>> isinstance(Double(), BoundedModule)
        True
        >>> from lben import LipschitzSequential, SLLLinear
        >>> chain = LipschitzSequential(SLLLinear(4, 6), Double())
        >>> round(chain.certificate((4,)).bound, 4)
        2.0
    """

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Prove a Lipschitz bound of the exact module, with the weights that run now.

        Args:
            image: height and width of images, or the whole shape of one sample.

        Returns:
            The proved l2 bound with all that it depends on.

        Raises:
            CertificateError: if the proof fails.
        """
        ...

    def forward_with_error(
        self,
        x: Tensor,
        certificate: LipschitzCertificate,
        error_in: ErrorIn = 0.0,
    ) -> Certified:
        """Return the output as the module runs, with bounds of its distance to the exact output.

        Args:
            x: as the module takes it.
            certificate: of this module, as it is now.
            error_in: bound of the l2 distance of x to the exact input, per sample.

        Returns:
            The output, with bounds of its l2 distance to the exact output, per sample.

        Raises:
            CertificateError: if the certificate is of something else.
        """
        ...


def with_roundoff(y: Tensor, size: Float[Tensor, "*batch"], growth: Growth) -> Certified:
    """Return an output whose rounding error is affine in ‖x‖₂, with bounds of it.

    Args:
        y: the output.
        size: upper bounds of ‖x‖₂ per sample, float64.
        growth: of the rounding error.
    """
    around = Affine(
        growth.constant + growth.slope * size, growth.slope, (growth.limit - size).clamp_min(-1.0)
    )
    return Certified(value=y, error=growth.at(size), uniform=around)


class RoundedModule(nn.Module, ABC):
    """A module without a solve, whose rounding error is at most affine in ‖x‖₂.

    A subclass says which certificates are its own (`check`) and how its error grows
    (`rounding_growth`); the bounds of one output follow.
    """

    @property
    def sample_shape(self) -> tuple[int | None, ...] | None:
        """The shape of one x as far as it is given; None where it may have any."""
        return None

    @abstractmethod
    def check(self, certificate: LipschitzCertificate, x: Tensor) -> None:
        """Refuse a certificate of something else, or of other images than x.

        Raises:
            CertificateError: naming the difference.
        """

    @abstractmethod
    def rounding_growth(self, shape: tuple[int, ...], dtype: torch.dtype) -> Growth:
        """Return a bound of ‖fl(y) − y‖₂ that is affine in ‖x‖₂.

        Args:
            shape: of one sample.
            dtype: in which the module runs.

        Raises:
            ValueError: if the shape or dtype does not fit; under autocast.
        """

    @torch.no_grad()
    def forward_with_error(
        self, x: Tensor, certificate: LipschitzCertificate, error_in: ErrorIn = 0.0
    ) -> Certified:
        """Return y as the module runs, with bounds of its distance to the exact y.

        Args:
            x: as the module takes it; with one batch dimension where `sample_shape` is None.
            certificate: of this module, and for images of this size.
            error_in: bound of the l2 distance of x to the exact input, per sample.

        Returns:
            y with bounds of ‖y − y*‖₂ per sample: at x, and at every input in a ball around x.

        Raises:
            CertificateError: if the certificate is of something else, or the module has hooks.
            ValueError: as `rounding_growth`.
        """
        refuse_hooks(self)
        self.check(certificate, x)
        size, growth = self._size_and_growth(x)
        return with_roundoff(self(x), size, growth).after(error_in, certificate.bound)

    def rounding(self, x: Tensor) -> Float[Tensor, "*batch"]:
        """Bound ‖fl(y) − y‖₂ per sample in float64, see `rounding_growth`."""
        size, growth = self._size_and_growth(x)
        return growth.at(size)

    def _size_and_growth(self, x: Tensor) -> tuple[Float[Tensor, "*batch"], Growth]:
        dims = x.ndim - 1 if self.sample_shape is None else min(len(self.sample_shape), x.ndim)
        return norms_up(x, dims), self.rounding_growth(tuple(x.shape[x.ndim - dims :]), x.dtype)


def require_kind(certificate: LipschitzCertificate, kind: type[C_], what: str) -> C_:
    """Return a certificate of the kind that a module needs.

    Args:
        certificate: as it was passed.
        kind: the class that the module needs.
        what: name of the module, for the message.

    Raises:
        CertificateError: if it is of another kind.
    """
    if not isinstance(certificate, kind):
        raise CertificateError(
            f"{what} needs its {kind.__name__}, got {type(certificate).__name__}: take that of "
            "certificate()"
        )
    return certificate


def height_and_width(image: tuple[int, ...] | None) -> tuple[int, int] | None:
    """Return (height, width) of images from that pair or from a sample's shape; None for features.

    Args:
        image: a pair, a shape of three numbers or of one, or None.

    Raises:
        TypeError: if these are no integers.
        ValueError: if one is not positive, or there are more than three.
    """
    if image is None or (isinstance(image, tuple) and len(image) == 1):
        return None
    if isinstance(image, tuple) and len(image) == 3:
        image = image[1:]
    return image_size(image)


def refuse_other_image(image: tuple[int, ...] | None, own: tuple[int, ...], what: str) -> None:
    """Refuse another image size than the one that a module was made for.

    Args:
        image: as it was passed.
        own: the size that the module was made for.
        what: name of the module, for the message.

    Raises:
        ValueError: naming both.
    """
    size = height_and_width(image)
    if size is not None and size != own[-2:]:
        raise ValueError(f"{what} was made for images of {own[-2:]}, got {size}")
