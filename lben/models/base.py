"""What is every classifier, whatever it is made of? Images in [0, 1] to certified logits."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.certificates import CertificateError, NetworkCertificate
from lben.layers import EquilibriumLayer, Normalize
from lben.layers.hooks import refuse_hooks
from lben.layers.sequential import rounded
from lben.models.configuration import Images
from lben.models.fingerprint import fingerprint
from lben.parameterizations import FixedWeights
from lben.radii.error_bounds import Affine, Stage
from lben.radii.margin import certified_radius
from solvers.precision import in_autocast

Promise = Literal["running", "exact", "textbook"]
"""What a certified radius promises.

- running: the model as it runs, with these weights in this precision and with solves that met this
  tolerance, gives the label at every image of the ball;
- exact: the exact network of the same weights, solved and evaluated without error, does;
- textbook: nothing. Margin ÷ bound of the logits as they come, as papers have it: for comparison.
"""

Bound = Literal["promised", "scaled", "pairs", "diagonal", "diagonal pairs"]
"""Which of its bounds a classifier proves: see `Classifier.certificate`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedLogits:
    """Logits with a proved bound of their distance to the exact network's.

    Attributes:
        logits: y.
        error: bound of ‖y − y*‖₂ per sample.
        elsewhere: bound of the same distance at every image within a radius, for a model that runs
            there with the same settings and whose solves meet their tolerance.
        steps: most solver iterations that a sample needed; 0 for an explicit network.
    """

    logits: Float[Tensor, "batch classes"]
    error: Float[Tensor, " batch"]
    elsewhere: Affine
    steps: int

    def radius(
        self,
        labels: Int[Tensor, " batch"],
        certificate: NetworkCertificate,
        promise: Promise = "running",
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of raw inputs; 0 where misclassified.

        Warns where the solver's tolerance is too loose for any promise about the model as it runs.
        """
        bound = certificate.radius_bound()
        if promise == "textbook":
            return certified_radius(self.logits, labels, bound)
        if promise == "exact":
            return certified_radius(self.logits, labels, bound, logit_error=self.error)
        if math.isinf(self.elsewhere.slope) and math.isfinite(certificate.bound):
            warnings.warn(
                "no radius is certified: the solver's tolerance is too loose to bound the error of "
                "the model as it runs at other images of a ball. Use a smaller tol, or "
                'promise="exact" for radii of the exact network',
                stacklevel=3,
            )
        return certified_radius(
            self.logits, labels, bound, logit_error=self.error, elsewhere=self.elsewhere
        )


class ClassifierConfig(Protocol):
    """What training and checkpoints need of a configuration: a frozen dataclass that builds."""

    @property
    def architecture(self) -> Architecture:
        """The part that is not the data's."""

    def build(self) -> Classifier:
        """Return a freshly initialised model."""
        ...


class Architecture(ABC):
    """What a classifier is, whatever its images are: a frozen dataclass of its own options.

    Attributes:
        supports: which of the options channels_last and autocast a training run may use.
    """

    @property
    def supports(self) -> frozenset[str]:
        return frozenset()

    @abstractmethod
    def for_data(self, data: Images) -> ClassifierConfig:
        """Return the configuration of a classifier of such images.

        Args:
            data: a `Dataset`, or whatever else has shape, classes, mean and std.
        """


class Classifier(nn.Module, ABC):
    """Normalisation and a network with a proved bound.

    Args:
        shape: channels, height, width of the images.
        mean, std: per channel, of the normalisation.
    """

    config: Any
    _fixed: ClassVar[dict[str, type[nn.Module]]] = {"normalize": Normalize}
    """Maps without a certificate of their own, whose norm a proof takes from their class."""

    def __init__(
        self, shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.shape = shape
        self.normalize = Normalize(mean, std)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return logits.

        Raises:
            ValueError: if the images have another shape or dtype.
        """
        return self.logits(self._normalized(x))

    def _normalized(self, x: Tensor) -> Tensor:
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
        return self.normalize(x)

    @abstractmethod
    def logits(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return the logits of normalised images."""

    @property
    @abstractmethod
    def gamma(self) -> float | None:
        """The bound of y on the normalised input that the parameterization promises."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[Bound, ...]:
        """Which bounds `certificate` can prove, from cheap to dear."""

    def certificate(self, bound: Bound = "promised") -> NetworkCertificate:
        """Prove a bound of the whole network from pixels to logits.

        Args:
            bound: "promised" by the parameterization (infinite where it promises none), or the
                least that the weights support: "scaled", with their own Λ up to a factor; "pairs",
                the same for every pair of logits; "diagonal", with the best Λ; "diagonal pairs".

        Raises:
            ValueError: if the model does not have this bound.
            CertificateError: if the proof fails, or `normalize` (or a stem) is of another class
                than the model was built with.
        """
        if bound not in self.bounds:
            raise ValueError(f"this model has the bounds {', '.join(self.bounds)}, not {bound!r}")
        self._refuse_foreign()
        with torch.no_grad():
            return replace(self._certificate(bound), network=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that a proof about this model depends on, see `fingerprint`.

        The layers in order with their weights and activations, normalisation, image size, dtype.
        """
        return fingerprint(self)

    def _check(self, certificate: NetworkCertificate) -> None:
        """Refuse a certificate of another network.

        One that `compose` made names no network: its layers are checked one by one where they run,
        and its input gain against the normalisation.
        """
        refuse_hooks(self)
        self._refuse_foreign()
        if certificate.network is not None:
            certificate.check(self.fingerprint)
        elif not certificate.input_gain >= self.normalize.gain:
            raise CertificateError(
                f"this certificate is for inputs that grow by at most {certificate.input_gain:.6g} "
                f"before the first layer, the normalisation has {self.normalize.gain:.6g}"
            )

    def _refuse_foreign(self) -> None:
        """Refuse a model in which another module stands for a map that no proof looks at."""
        for name, kind in self._fixed.items():
            if type(getattr(self, name)) is not kind:
                raise CertificateError(
                    f"{name} is a {type(getattr(self, name)).__name__}, and a proof of this model "
                    f"knows {kind.__name__} alone: build another model for another map"
                )

    @abstractmethod
    def _certificate(self, bound: Bound) -> NetworkCertificate:
        """Prove one of `bounds`."""

    @torch.no_grad()
    def certified_logits(
        self, x: Float[Tensor, "batch channels height width"], certificate: NetworkCertificate
    ) -> CertifiedLogits:
        """Return logits as the model runs, with a bound of their distance to the exact network's.

        The exact network has the weights that run, in float32 or float64, and is solved exactly and
        without rounding; the bound covers solver error and rounding from pixels to logits.

        Raises:
            ValueError: if the model is neither float32 nor float64.
            CertificateError: if the certificate is not of this model as it is now.
        """
        self._check(certificate)
        normalized, gain = self.prepared(x), certificate.input_gain
        growth = self.normalize.rounding_growth(self.shape, x.dtype)
        start = Stage.start(x).then(rounded(normalized, x, growth), gain)
        logits, stage = self._certified(normalized, start, certificate)
        return CertifiedLogits(
            logits=logits, error=stage.error, elsewhere=stage.uniform, steps=stage.steps
        )

    @abstractmethod
    def _certified(
        self, x: Tensor, stage: Stage, certificate: NetworkCertificate
    ) -> tuple[Tensor, Stage]:
        """Return the logits of normalised images, and what is known of them."""

    def prepared(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return the normalised images of a model whose rounding is bounded, or raise."""
        dtype = self.dtype
        if dtype not in (torch.float32, torch.float64) or in_autocast(x.device.type):
            raise ValueError(
                f"rounding is bounded in float32 and float64 without autocast, the model is {dtype}"
            )
        return self._normalized(x)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model runs in."""
        return next(self.parameters()).dtype

    @property
    def tol(self) -> float | None:
        """The loosest tolerance of its equilibrium layers; None where there are none."""
        layers = (m for m in self.modules() if isinstance(m, EquilibriumLayer))
        return max((layer.tol for layer in layers), default=None)

    def freeze(self, tol: float | None = None) -> Self:
        """Return a copy for evaluation as the model runs: on the CPU, in its own precision.

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

    def exact(self, tol: float) -> Self:
        """Return a copy that stands for the exact network: float64, on the CPU, solved to `tol`.

        Equilibrium layers keep the very weights that run; feed-forward layers compute T anew from
        their parameters, which changes them by the rounding of the precision that they ran in.
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
        certificate: NetworkCertificate | None = None,
        *,
        promise: Promise = "running",
        sound: bool = True,
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of pixels in [0, 1]; 0 where misclassified.

        Args:
            x: images in [0, 1].
            labels: i.
            certificate: of this model; that of the promised bound when omitted.
            promise: what the radius is for: the model as it runs at every image of the ball, the
                exact network, or (textbook) nothing.
            sound: False for the textbook number.

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
        result = self.certified_logits(x, certificate)
        return result.radius(labels, certificate, "textbook" if not sound else promise)
