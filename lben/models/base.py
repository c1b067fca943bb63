"""What do all classifiers share? They map images in [0, 1] to logits, with a proved bound."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.certificates import ChainCertificate
from lben.layers import EquilibriumLayer, Normalize
from lben.layers.bounded import refuse_other_image
from lben.layers.fingerprint import fingerprint
from lben.layers.hooks import refuse_hooks
from lben.layers.sequential import chain_certificate, check_bounded, stage_after
from lben.models.configuration import Images
from lben.parameterizations import FixedWeights
from lben.radii.error_bounds import Affine, Certified
from lben.radii.margin import margin_radius
from solvers.precision import in_autocast

Promise = Literal["running", "exact", "textbook"]
"""What a certified radius promises.

- running: at every image of the ball the model as it runs gives the label. It has these weights and
  this precision, and its solves meet this tolerance.
- exact: at every image of the ball the exact network of the same weights gives the label. It is
  solved and evaluated without error.
- textbook: nothing is promised. The number is margin ÷ bound of the computed logits, as papers
  report it, for comparison.
"""

Bound = Literal["promised", "scaled", "pairs", "diagonal", "diagonal pairs"]
"""Which of its bounds a classifier proves: see `Classifier.certificate`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedLogits(Certified):
    """Logits with a proved bound of their distance to the exact network's: see `Certified`.

    Example:
        >>> import torch
        >>> from lben import EquilibriumClassifierConfig
        >>> model = EquilibriumClassifierConfig(
        ...     shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,), hidden=8
        ... ).build()
        >>> certificate = model.certificate()
        >>> found = model.forward_with_error(torch.rand(2, 1, 4, 4), certificate)
        >>> found.radius(found.value.argmax(1), certificate).shape
        torch.Size([2])
    """

    uniform: Affine

    def radius(
        self,
        labels: Int[Tensor, " batch"],
        certificate: ChainCertificate,
        promise: Promise = "running",
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of raw inputs; 0 where misclassified.

        A warning says if the solver's tolerance is too loose for any promise about the model as it
        runs.

        Args:
            labels: integers in [0, classes), one per image.
            certificate: of the model that gave these logits.
            promise: what the radii are for, see `Promise`.

        Returns:
            One radius ≥ 0 per image, float64.
        """
        bound, logits, error = certificate.radius_bound(), self.value, self.error
        if promise == "textbook":
            return margin_radius(logits, labels, bound)
        if promise == "exact":
            return margin_radius(logits, labels, bound, logit_error=error)
        around = self.uniform
        if math.isinf(around.slope) and math.isfinite(certificate.bound):
            warnings.warn(
                "no radius is certified: the error of the model as it runs at other images of a "
                "ball is not bounded. Likely causes: a solver's tolerance is too loose (use a "
                "smaller tol), or a module gives no uniform bound. For radii of the exact network "
                'take promise="exact"',
                stacklevel=3,
            )
        return margin_radius(logits, labels, bound, logit_error=error, elsewhere=around)


@runtime_checkable
class ClassifierConfig(Protocol):
    """A frozen dataclass that builds a classifier: all that training and checkpoints rely on.

    Example:
        >>> from lben import EquilibriumClassifierConfig
        >>> config: ClassifierConfig = EquilibriumClassifierConfig(
        ...     shape=(1, 2, 2), classes=2, mean=(0.5,), std=(0.5,), hidden=4
        ... )
        >>> type(config.build()).__name__
        'EquilibriumClassifier'
    """

    @property
    def architecture(self) -> Architecture:
        """The part of the configuration that does not depend on the data."""

    def build(self) -> Classifier:
        """Return a freshly initialised model."""
        ...


class Architecture(ABC):
    """The options of a classifier that do not depend on its images: a frozen dataclass.

    Attributes:
        supports: which of the options channels_last and autocast a training run may use.

    Example:
        >>> from lben.models import EquilibriumArchitecture
        >>> isinstance(EquilibriumArchitecture(hidden=20), Architecture)
        True
    """

    @property
    def supports(self) -> frozenset[str]:
        return frozenset()

    @abstractmethod
    def for_data(self, data: Images) -> ClassifierConfig:
        """Return the configuration of a classifier of such images.

        Args:
            data: a `Dataset`, or another object with shape, classes, mean and std.
        """


class Classifier(nn.Module, ABC):
    """Normalisation and a network with a proved bound: images in [0, 1] to logits.

    Args:
        shape: channels, height, width of the images.
        mean, std: per channel, of the normalisation.

    Example:
        >>> import torch
        >>> from lben import NormalizedLinear, Flatten
        >>> class Linear(Classifier):
        ...     def __init__(self):
        ...         super().__init__((1, 2, 2), mean=(0.5,), std=(0.25,))
        ...         self.flatten, self.head = Flatten(), NormalizedLinear(4, 3)
        ...     @property
        ...     def stages(self):
        ...         return self.normalize, self.flatten, self.head
        ...     @property
        ...     def gamma(self):
        ...         return self.head.weights().gamma
        >>> model = Linear()
        >>> model(torch.rand(2, 1, 2, 2)).shape, len(model.certificate().layers)
        (torch.Size([2, 3]), 3)
    """

    config: Any

    def __init__(
        self, shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.shape = shape
        self.normalize = Normalize(mean, std)

    @property
    @abstractmethod
    def stages(self) -> tuple[nn.Module, ...]:
        """The modules that images pass, one after the other; each a `BoundedModule`."""

    @property
    @abstractmethod
    def gamma(self) -> float | None:
        """The bound of y on the normalised input that the parameterization promises."""

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Which bounds `certificate` can prove, from cheap to expensive."""
        return ("promised",)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return logits.

        Raises:
            ValueError: if the images have another shape or dtype.
        """
        self._check_images(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"expected images of shape (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"expected images in [0, 1] as floating-point numbers, got {x.dtype}: convert them "
                "with lben.data.pixels"
            )

    def certificate(
        self, image: tuple[int, ...] | None = None, *, bound: Bound = "promised"
    ) -> ChainCertificate:
        """Prove a bound of the whole network from pixels to logits.

        Args:
            image: height and width, or the shape of one image; may be omitted, as the model is made
                for one size.
            bound: which bound is proved. "promised": γ of the parameterization (infinite if it has
                none). "scaled": the smallest bound for the weights' own Λ up to a factor.
                "diagonal": the smallest bound for the best diagonal Λ. "pairs" and "diagonal
                pairs": the same for every pair of logits.

        Returns:
            The proved l2 bound from pixels to logits, with the certificates of all stages.

        Raises:
            ValueError: if the model does not have this bound, or for another image size.
            CertificateError: if the proof fails.
        """
        if bound not in self.bounds:
            raise ValueError(f"this model has the bounds {', '.join(self.bounds)}, not {bound!r}")
        refuse_other_image(image, self.shape, "the model")
        check_bounded(self.stages)
        with torch.no_grad():
            return replace(self._certificate(bound), network=self.fingerprint)

    def _certificate(self, bound: Bound) -> ChainCertificate:
        """Prove one of `bounds`."""
        return chain_certificate(self.stages, self.shape)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that a proof about this model depends on.

        It covers the layers in order with their weights and activations, the normalisation, the
        image size and the dtype; see `lben.layers.fingerprint`.
        """
        return fingerprint(self)

    def _check(self, certificate: ChainCertificate) -> None:
        """Refuse a certificate of another network.

        A certificate made by `compose` names no network. Its modules are checked when they run.
        """
        refuse_hooks(self)
        check_bounded(self.stages)
        if certificate.network is not None:
            certificate.check_network(self.fingerprint)

    @torch.no_grad()
    def forward_with_error(
        self,
        x: Float[Tensor, "batch channels height width"],
        certificate: ChainCertificate,
        error_in: Float[Tensor, " batch"] | float = 0.0,
    ) -> CertifiedLogits:
        """Return logits as the model runs, with bounds of their distance to the exact network's.

        The exact network has the weights that run, in float32 or float64, and is solved and
        evaluated without error. The bound covers solver errors and rounding from pixels to logits.

        Args:
            x: images in [0, 1].
            certificate: of this model.
            error_in: bound of the l2 distance of x to the exact images, per image.

        Returns:
            The logits, with bounds of their l2 distance to the exact logits, per image.

        Raises:
            ValueError: if the model is neither float32 nor float64.
            CertificateError: if the certificate is not of this model as it is now.
        """
        self._check(certificate)
        self._check_rounding(x)
        y, stage = stage_after(self.stages, x, certificate)
        found = CertifiedLogits(
            value=y, error=stage.error, uniform=stage.uniform, steps=stage.steps
        )
        return found.after(error_in, certificate.bound)

    def _check_rounding(self, x: Tensor) -> None:
        """Refuse images of another kind, and a model whose rounding is not bounded."""
        dtype = self.dtype
        if dtype not in (torch.float32, torch.float64) or in_autocast(x.device.type):
            raise ValueError(
                f"rounding is bounded in float32 and float64 without autocast, the model is {dtype}"
            )
        self._check_images(x)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model runs in."""
        return next(chain(self.parameters(), self.buffers())).dtype

    @property
    def tol(self) -> float | None:
        """The loosest tolerance of its equilibrium layers; None where there are none."""
        layers = (m for m in self.modules() if isinstance(m, EquilibriumLayer))
        return max((layer.tol for layer in layers), default=None)

    def freeze(self, tol: float | None = None) -> Self:
        """Return a copy in eval mode on the CPU, in the precision that the model runs in.

        Args:
            tol: relative tolerance of the solver; that of each layer when None. A solve that misses
                it raises.
        """
        frozen = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        for layer in frozen.modules():
            if isinstance(layer, EquilibriumLayer):
                layer.tol = layer.tol if tol is None else tol
                layer.on_failure, layer.max_steps = "raise", 20 * layer.max_steps
        return frozen

    def to_exact(self, tol: float) -> Self:
        """Return a copy that stands for the exact network: float64, on the CPU, solved to `tol`.

        Equilibrium layers keep the weights that run. Feed-forward layers compute T anew from their
        parameters, so their weights change by the rounding of the precision that they ran in.

        Args:
            tol: relative tolerance of the solves.
        """
        exact = self.freeze(tol)
        for layer in exact.modules():
            if isinstance(layer, EquilibriumLayer):
                layer.parameterization = FixedWeights(layer.weights())
        return exact.double()

    def certified_radius(
        self,
        x: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        certificate: ChainCertificate | None = None,
        *,
        promise: Promise = "running",
        sound: bool = True,
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of pixels in [0, 1]; 0 where misclassified.

        Args:
            x: images in [0, 1].
            labels: i.
            certificate: of this model; that of the promised bound when omitted.
            promise: what the radius promises, see `Promise`.
            sound: False for the textbook number.

        Returns:
            One radius ≥ 0 per image, float64.

        Raises:
            ValueError: if the promise is unknown, labels do not fit, or the model is neither
                float32 nor float64.
            CertificateError: if the certificate is not of this model as it is now.
        """
        if promise not in get_args(Promise):
            raise ValueError(
                f"promise must be one of {', '.join(get_args(Promise))}, got {promise!r}"
            )
        certificate = self.certificate() if certificate is None else certificate
        result = self.forward_with_error(x, certificate)
        return result.radius(labels, certificate, "textbook" if not sound else promise)
