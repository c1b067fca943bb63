"""What is the bound of a chain of modules, and how large is the error of the chain as it runs?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lben import precision
from lben.certificates import CertificateError, ChainCertificate, LipschitzCertificate, compose
from lben.layers.bounded import BoundedModule, ErrorIn, require_kind
from lben.layers.fixed import Flatten
from lben.layers.hooks import refuse_hooks
from lben.radii.error_bounds import Certified, Stage


class LipschitzSequential(nn.Sequential):
    """torch.nn.Sequential of modules with proved bounds; its bound is their product.

    It takes every `BoundedModule`: layers, heads, fixed maps, normalisations, other chains, and
    modules that you wrote. x may have any number of batch dimensions before the dimensions of a
    sample, which the first module prescribes. A chain that starts with `Flatten` prescribes none:
    there the first dimension of x is the batch.

    Raises:
        ValueError: if a module has no bound.

    Example:
        >>> from lben import AveragePooling, Flatten, NormalizedLinear, SLLConv2d
        >>> chain = LipschitzSequential(
        ...     SLLConv2d(3, 5), AveragePooling(4), Flatten(), NormalizedLinear(12, 10)
        ... )
        >>> certificate = chain.certificate((3, 8, 8))
        >>> len(certificate.layers), len(certificate.pairs)
        (4, 10)
        >>> found = chain.forward_with_error(torch.rand(2, 3, 8, 8), certificate)
        >>> found.value.shape, bool((found.error < 0.01).all())
        (torch.Size([2, 10]), True)
    """

    def __init__(self, *layers: nn.Module | OrderedDict[str, nn.Module]) -> None:
        super().__init__(*layers)  # type: ignore[arg-type]
        check_bounded(self)

    @property
    def sample_shape(self) -> tuple[int | None, ...] | None:
        """The shape of one x as the first module that prescribes a shape has it, or None."""
        for layer in self:
            if isinstance(layer, Flatten):
                return None
            shape: tuple[int | None, ...] | None = getattr(layer, "sample_shape", None)
            if shape is not None:
                return shape
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Return y, of every sample."""
        x, batch = self._flatten_batch(x)
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y if batch is None else y.reshape(*batch, *y.shape[1:])

    def _flatten_batch(self, x: Tensor) -> tuple[Tensor, torch.Size | None]:
        """Return x with one batch dimension, and the former ones, None if nothing changed."""
        shape = self.sample_shape
        if shape is None or x.ndim < len(shape) or x.ndim == len(shape) + 1:
            return x, None
        batch = x.shape[: x.ndim - len(shape)]
        return x.reshape(math.prod(batch), *x.shape[x.ndim - len(shape) :]), batch

    def certificate(self, image: tuple[int, ...] | None = None) -> ChainCertificate:
        """Prove every module, and compose their bounds.

        Args:
            image: the shape of one sample: (p,), or (channels, height, width). Height and width are
                enough if the first module prescribes the channels; it may be omitted if the first
                module prescribes the whole shape.

        Returns:
            The product of the modules' bounds, with their certificates.

        Raises:
            ValueError: if a module has no bound, or the shape is not known; under autocast.
            CertificateError: if a proof fails.
        """
        precision.refuse_autocast()
        check_bounded(self)
        return chain_certificate(self, _shape_of_sample(image, self.sample_shape))

    @torch.no_grad()
    def forward_with_error(
        self,
        x: Tensor,
        certificate: LipschitzCertificate,
        error_in: ErrorIn = 0.0,
    ) -> Certified:
        """Return y as the chain runs, with bounds of its distance to the exact y, here and around.

        The exact y is computed from the weights of every module with exact equilibria and without
        rounding. The error that a module adds is multiplied by the bounds of the modules after it.

        Args:
            x: float32 or float64.
            certificate: of this chain, for images of this size.
            error_in: bound of the l2 distance of x to the exact input, per sample.

        Returns:
            y with bounds of ‖y − y*‖₂ per sample: at x, and at every input in a ball around x.

        Raises:
            CertificateError: if a certificate is of other modules, weights or images.
            ValueError: if a module has no bound; under autocast.
        """
        precision.refuse_autocast()
        check_bounded(self)
        refuse_hooks(self)
        x, batch = self._flatten_batch(x)
        found = evaluate_chain(list(self), x, certificate)
        if batch is not None:
            found = found.reshape(batch)
        return found.after(error_in, certificate.bound)


def check_bounded(layers: Iterable[nn.Module]) -> None:
    """Refuse modules without a bound.

    Args:
        layers: the modules of a chain.

    Raises:
        ValueError: naming the class.
    """
    for layer in layers:
        if not isinstance(layer, BoundedModule):
            raise ValueError(
                f"{type(layer).__name__} has no proved Lipschitz bound: use the layers, maps, "
                "heads and chains of lben.layers, or a module with the two methods of "
                "lben.layers.BoundedModule"
            )


@torch.no_grad()
def chain_certificate(
    layers: Sequence[nn.Module] | nn.Sequential, shape: tuple[int, ...]
) -> ChainCertificate:
    """Prove modules one after the other, for samples of a shape, and compose their bounds.

    Where the last module bounds every pair of its outputs, so does the chain.

    Args:
        layers: every one a `BoundedModule`.
        shape: of one sample, without the batch.

    Returns:
        The product of the bounds, with the certificates of the modules.
    """
    layers = list(layers)
    tensors = (t for layer in layers for t in (*layer.parameters(), *layer.buffers()))
    reference = next(tensors, torch.zeros((), device="cpu"))
    x = torch.zeros(1, *shape, dtype=reference.dtype, device=reference.device)
    proofs: list[LipschitzCertificate] = []
    for layer in layers:
        assert isinstance(layer, BoundedModule)
        proofs.append(layer.certificate(tuple(x.shape[1:])))
        x = layer(x)
    pairs = getattr(layers[-1], "pair_certificate", None) if layers else None
    return compose(proofs, None if pairs is None else pairs())


def evaluate_chain(
    layers: Sequence[nn.Module], x: Tensor, certificate: LipschitzCertificate
) -> Certified:
    """Return the output of modules in order, with bounds of its distance to the exact output.

    Args and errors are those of `stage_after`.
    """
    y, stage = stage_after(layers, x, certificate)
    return Certified(value=y, error=stage.error, uniform=stage.uniform, steps=stage.steps)


def stage_after(
    layers: Sequence[nn.Module], x: Tensor, certificate: LipschitzCertificate
) -> tuple[Tensor, Stage]:
    """Return the output of modules in order, and the bounds of the chain up to there.

    Args:
        layers: every one a `BoundedModule`.
        x: with one batch dimension.
        certificate: of these modules.

    Returns:
        The output, and the gain and error bounds of the whole chain in terms of x.

    Raises:
        CertificateError: if the certificate is of other modules.
    """
    proofs = require_kind(certificate, ChainCertificate, "a chain").layers
    if len(proofs) != len(layers):
        raise CertificateError(
            f"this certificate is of {len(proofs)} modules one after the other, there are "
            f"{len(layers)}: take that of this chain"
        )
    stage = Stage.start(x)
    for layer, proof in zip(layers, proofs, strict=True):
        assert isinstance(layer, BoundedModule)
        found = layer.forward_with_error(x, proof)
        x, stage = found.value, stage.then(found, proof.bound)
    return x, stage


def _shape_of_sample(
    image: tuple[int, ...] | None, known: tuple[int | None, ...] | None
) -> tuple[int, ...]:
    """Return the shape of one sample from the argument and the shape that the first module has."""
    if image is not None and len(image) == 2 and known is not None and len(known) == 3:
        image = None if known[0] is None else (known[0], *image)
    elif image is None and known is not None and all(size is not None for size in known):
        image = tuple(size for size in known if size is not None)
    if image is None or len(image) == 2:
        raise ValueError(
            "the chain is proved for a shape of samples: certificate((p,)) or "
            f"certificate((channels, height, width)), got {image}"
        )
    return tuple(image)
