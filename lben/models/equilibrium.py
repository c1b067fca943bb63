"""What is a classifier of one equilibrium layer made of, and which bounds does it prove?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.certificates import (
    CertificateError,
    ChainCertificate,
    LayerCertificate,
    PairCertificate,
    certify,
    compose,
    sensitivity,
)
from lben.layers import (
    EquilibriumLayer,
    EquilibriumLinear,
    Flatten,
    InvertibleDownsampling,
    PooledEquilibriumConv2d,
)
from lben.layers.equilibrium import SolveOptions
from lben.layers.sequential import chain_certificate, stage_after
from lben.models.base import Architecture, Bound, Classifier, Promise
from lben.models.configuration import Images, ImageTask, check_channels, check_kernel, fields_of
from lben.radii.error_bounds import Certified
from lben.radii.local import LocalCertifier, OperatingPoints, network_fingerprint
from lben.tightening import tighten_diagonal, tighten_pairs, tighten_pooled, tighten_scaled
from lben.values import check_positive, check_tol, conform
from lben.weights import DenseWeights, PooledWeights, check_gamma
from solvers import LeakyReLU, ProximalActivation, ReLU, Tanh

ActivationName = Literal["relu", "leaky_relu", "tanh"]


@dataclass(frozen=True, kw_only=True)
class SingleLayerArchitecture(Architecture):
    """The options that all classifiers of one equilibrium layer share.

    Attributes:
        gamma: l2 Lipschitz bound on the normalised input; None for no bound.
        learn_metric: train Λ (with gamma None and this off: monDEQ).
        activation: σ: relu, leaky_relu or tanh.
        epsilon: slack of the certificate.
        tol: relative tolerance of forward and backward solves.
        max_steps: iteration limit of the solver.

    Example:
        >>> config = EquilibriumClassifierConfig(
        ...     shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,), hidden=8
        ... )
        >>> model = config.build()
        >>> model.certificate().bound  # γ / std
        4.000000000000001
    """

    gamma: float | None = 1.0
    learn_metric: bool = True
    activation: ActivationName = "relu"
    epsilon: float = 1e-3
    tol: float = 1e-4
    max_steps: int = 5000

    def __post_init__(self) -> None:
        conform(self)
        check_positive(self, "epsilon", "tol", "max_steps")
        check_tol(self.tol)
        check_gamma(self.gamma)


@dataclass(frozen=True, kw_only=True)
class EquilibriumArchitecture(SingleLayerArchitecture):
    """A fully connected equilibrium layer, whatever its images are.

    Attributes:
        hidden: equilibrium units n.
        feedthrough: give the output a direct term Dx.

    Example:
        >>> from lben.data import load
        >>> model = EquilibriumArchitecture(hidden=20, gamma=2.0).for_data(load("digits")).build()
        >>> model.shape, model.gamma
        ((1, 8, 8), 2.0)
    """

    hidden: int = 80
    feedthrough: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden")

    def for_data(self, data: Images) -> EquilibriumClassifierConfig:
        return EquilibriumClassifierConfig(
            **fields_of(EquilibriumArchitecture, self), **fields_of(ImageTask, data)
        )


@dataclass(frozen=True, kw_only=True)
class EquilibriumClassifierConfig(EquilibriumArchitecture, ImageTask):
    """A fully connected equilibrium classifier of images in [0, 1].

    Its fields are those of `EquilibriumArchitecture` and `ImageTask`; its bound in pixels is
    gamma / min(std).

    Example:
        >>> config = EquilibriumClassifierConfig(
        ...     shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), hidden=20
        ... )
        >>> config.build()(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __post_init__(self) -> None:
        EquilibriumArchitecture.__post_init__(self)
        ImageTask.__post_init__(self)

    @property
    def architecture(self) -> EquilibriumArchitecture:
        """The part of the configuration that does not depend on the data."""
        return EquilibriumArchitecture(**fields_of(EquilibriumArchitecture, self))

    def build(self) -> EquilibriumClassifier:
        """Return a freshly initialised model."""
        return EquilibriumClassifier(self)


@dataclass(frozen=True, kw_only=True)
class ConvolutionalEquilibriumArchitecture(SingleLayerArchitecture):
    """A convolutional equilibrium layer with pooled output, whatever its images are.

    The defaults are the single convolution of the papers (81 channels, 3 × 3, 4 × 4 pooling and a
    matrix; Winston and Kolter 2020, Revay, Wang and Manchester 2020), here with one bound of the
    whole; several numbers of channels are the multi-tier network.

    Attributes:
        channels: hidden channels of every scale, finest first, each of half the resolution.
        stem: invertible down-sampling of the image before all else; 1 for none.
        kernel_size: of all convolutions, odd.
        pool: size of the pooling windows in pixels after the stem.
        circular: the image is a torus; otherwise it is surrounded by zeros.

    Example:
        >>> ConvolutionalEquilibriumArchitecture(channels=(16, 32, 64)).epsilon
        0.1
    """

    channels: tuple[int, ...] = (81,)
    stem: int = 1
    kernel_size: int = 3
    pool: int = 4
    circular: bool = False
    epsilon: float = 0.1
    tol: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "stem", "pool")
        check_channels(self.channels)
        check_kernel(self.kernel_size)

    def for_data(self, data: Images) -> ConvolutionalEquilibriumClassifierConfig:
        return ConvolutionalEquilibriumClassifierConfig(
            **fields_of(ConvolutionalEquilibriumArchitecture, self), **fields_of(ImageTask, data)
        )


@dataclass(frozen=True, kw_only=True)
class ConvolutionalEquilibriumClassifierConfig(ConvolutionalEquilibriumArchitecture, ImageTask):
    """A convolutional equilibrium classifier of images in [0, 1].

    Its fields are those of `ConvolutionalEquilibriumArchitecture` and `ImageTask`; its bound in
    pixels is gamma / min(std).

    Example:
        >>> config = ConvolutionalEquilibriumClassifierConfig(
        ...     shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), channels=(6,), pool=2
        ... )
        >>> config.build()(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __post_init__(self) -> None:
        ConvolutionalEquilibriumArchitecture.__post_init__(self)
        ImageTask.__post_init__(self)

    @property
    def architecture(self) -> ConvolutionalEquilibriumArchitecture:
        """The part of the configuration that does not depend on the data."""
        own = fields_of(ConvolutionalEquilibriumArchitecture, self)
        return ConvolutionalEquilibriumArchitecture(**own)

    def build(self) -> ConvolutionalEquilibriumClassifier:
        """Return a freshly initialised model."""
        return ConvolutionalEquilibriumClassifier(self)


class SingleLayerClassifier(Classifier):
    """Normalisation, a fixed map and one equilibrium layer: images in [0, 1] to logits."""

    layer: EquilibriumLayer[Any]

    @classmethod
    def _hold(cls, layer: EquilibriumLayer[Any], task: ImageTask) -> Self:
        """Return a classifier with this layer."""
        model = cls.__new__(cls)
        Classifier.__init__(model, task.shape, task.mean, task.std)
        model.config, model.layer = task, layer
        model.normalize.to(layer.weights().b_y.dtype)
        return model

    @property
    def gamma(self) -> float | None:
        return self.layer.gamma

    def _extend_to_network(
        self, whole: LayerCertificate, pairs: PairCertificate | None = None
    ) -> ChainCertificate:
        """Return the certificate of the network that follows from a certificate of its layer."""
        whole = replace(whole, sensitivity=sensitivity(self.layer.weights(), whole))
        before = chain_certificate(self.stages[:-1], self.shape).layers
        return compose([*before, whole], pairs)


class EquilibriumClassifier(SingleLayerClassifier):
    """Normalisation, flattening and one `EquilibriumLinear`: images in [0, 1] to logits.

    Example:
        >>> import torch
        >>> from lben import EquilibriumClassifierConfig
        >>> model = EquilibriumClassifierConfig(
        ...     shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,), hidden=8
        ... ).build()
        >>> x, labels = torch.rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)
        >>> model(x).shape, model.certified_radius(x, labels).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    layer: EquilibriumLinear

    def __init__(self, config: EquilibriumClassifierConfig) -> None:
        super().__init__(config.shape, config.mean, config.std)
        self.config = config
        self.layer = EquilibriumLinear(
            math.prod(config.shape),
            config.hidden,
            config.classes,
            gamma=config.gamma,
            activation=activation(config.activation),
            feedthrough=config.feedthrough,
            learn_metric=config.learn_metric,
            epsilon=config.epsilon,
            tol=config.tol,
            max_steps=config.max_steps,
        )

    @classmethod
    def from_weights(
        cls, weights: DenseWeights, task: ImageTask, **options: Unpack[SolveOptions]
    ) -> Self:
        """Return a classifier whose layer holds given weights, frozen.

        Args:
            weights: of flattened, normalised images to logits.
            task: shape, classes and normalisation of the images.
            options: as `EquilibriumLinear.from_weights`.

        Returns:
            The classifier. Its config is the task, which builds no model: such a classifier is
            read, and not trained.

        Raises:
            ValueError: if the weights do not fit the task.

        Example:
            >>> import torch
            >>> from lben import EquilibriumClassifier, EquilibriumLinear
            >>> from lben.models import ImageTask
            >>> task = ImageTask(shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,))
            >>> weights = EquilibriumLinear(16, 8, 3, gamma=2.0).weights()
            >>> model = EquilibriumClassifier.from_weights(weights, task)
            >>> model(torch.rand(5, 1, 4, 4)).shape, round(model.certificate().bound, 6)
            (torch.Size([5, 3]), 8.0)
        """
        wanted = (math.prod(task.shape), task.classes)
        if (weights.in_features, weights.out_features) != wanted:
            raise ValueError(
                f"images of shape {task.shape} and {task.classes} classes need weights with "
                f"{wanted[0]} inputs and {wanted[1]} outputs, got {weights.in_features} and "
                f"{weights.out_features}"
            )
        return cls._hold(EquilibriumLinear.from_weights(weights, **options), task)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.normalize, _FLATTEN, self.layer

    def local_certifier(self, certificate: ChainCertificate) -> LocalCertifier:
        """Return the certifier that proves radii around single images.

        Args:
            certificate: of this model; its bound is used and not proved again.

        Raises:
            ValueError: if the certificate has no finite bound.
            CertificateError: if the certificate is for other weights, or a proof fails.
        """
        if not math.isfinite(certificate.bound):
            raise ValueError(
                "local proofs start from a finite bound: take certificate(bound='scaled')"
            )
        weights = self.layer.weights()
        certificate.layers[-1].check(weights)
        return LocalCertifier(
            weights, self.layer.activation, certificate.radius_bound(),
            input_gain=self.normalize.gain,
        )  # fmt: skip

    @torch.no_grad()
    def operating_points(
        self,
        x: Float[Tensor, "batch channels height width"],
        certificate: ChainCertificate,
        local: LocalCertifier,
        *,
        pixels: bool = False,
        promise: Promise = "running",
    ) -> OperatingPoints:
        """Return the operating points of the model at some images, for proofs around these images.

        Args:
            x: images in [0, 1].
            certificate: of this model.
            local: the certifier of this model.
            pixels: whether proofs are for images in [0, 1] only; then more of them succeed.
            promise: whether proofs are for the model as it runs, or for the exact network.

        Raises:
            CertificateError: if a proof is for other weights, or the local one for another
                activation or normalisation.
        """
        self._check(certificate)
        own = network_fingerprint(self.layer.weights(), self.layer.activation, self.normalize.gain)
        if local.fingerprint != own:
            raise CertificateError(
                "this local certificate is for other weights, another activation or another "
                f"normalisation: fingerprint {local.fingerprint[:12]}…, the model has {own[:12]}…"
            )
        self._check_rounding(x)
        *before, proof = certificate.layers
        features, start = stage_after(self.stages[:-1], x, compose(before))
        found = self.layer.operating_points(features, proof)
        logits = Certified(value=found.logits, error=found.logit_error, uniform=found.elsewhere)
        stage = start.then(logits, proof.bound)
        return replace(
            found,
            fingerprint=own,
            v_error=found.v_error + 2 * start.error[:, None] * local.gains,
            logit_error=stage.error,
            elsewhere=stage.uniform if promise == "running" else None,
            box_slack=self.normalize.box_slack(x).flatten(2) if pixels else None,
        )

    @property
    def bounds(self) -> tuple[Bound, ...]:
        with torch.no_grad():
            feedthrough = self.layer.weights().D is not None
        if feedthrough:
            return ("promised", "diagonal", "diagonal pairs")
        return ("promised", "scaled", "pairs", "diagonal", "diagonal pairs")

    def _certificate(self, bound: Bound) -> ChainCertificate:
        if bound == "promised":
            return super()._certificate(bound)
        weights, diagonal = self.layer.weights(), bound.startswith("diagonal")
        claim = tighten_diagonal(weights) if diagonal else tighten_scaled(weights)
        pairs = None
        if bound.endswith("pairs"):
            pairs = certify(weights, tighten_pairs(weights, fix_multiplier=not diagonal))
        return self._extend_to_network(certify(weights, claim), pairs)


class ConvolutionalEquilibriumClassifier(SingleLayerClassifier):
    """Normalisation and one `PooledEquilibriumConv2d`: images in [0, 1] to logits.

    Example:
        >>> import torch
        >>> from lben import ConvolutionalEquilibriumClassifierConfig
        >>> model = ConvolutionalEquilibriumClassifierConfig(
        ...     shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.25,), channels=(4, 8)
        ... ).build()
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, config: ConvolutionalEquilibriumClassifierConfig) -> None:
        super().__init__(config.shape, config.mean, config.std)
        self.config = config
        self.stem = InvertibleDownsampling(config.stem)
        start = torch.zeros(1, *config.shape, device="meta")  # only its shape is used
        channels, height, width = self.stem(start).shape[1:]
        self.layer = PooledEquilibriumConv2d(
            channels,
            config.channels,
            config.classes,
            config.kernel_size,
            image=(height, width),
            pool=config.pool,
            circular=config.circular,
            gamma=config.gamma,
            activation=activation(config.activation),
            learn_metric=config.learn_metric,
            epsilon=config.epsilon,
            tol=config.tol,
            max_steps=config.max_steps,
        )

    @classmethod
    def from_weights(
        cls, weights: PooledWeights, task: ImageTask, **options: Unpack[SolveOptions]
    ) -> Self:
        """Return a classifier whose layer holds given weights, frozen.

        Args:
            weights: of normalised images to logits.
            task: shape, classes and normalisation of the images.
            options: as `PooledEquilibriumConv2d.from_weights`.

        Returns:
            The classifier, as `EquilibriumClassifier.from_weights`.

        Raises:
            ValueError: if the weights do not fit the task.

        Example:
            >>> import torch
            >>> from lben import ConvolutionalEquilibriumClassifier, PooledEquilibriumConv2d
            >>> from lben.models import ImageTask
            >>> task = ImageTask(shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,))
            >>> weights = PooledEquilibriumConv2d(1, 2, 3, image=(4, 4)).weights()
            >>> model = ConvolutionalEquilibriumClassifier.from_weights(weights, task)
            >>> model(torch.rand(5, 1, 4, 4)).shape
            torch.Size([5, 3])
        """
        if weights.sample_shape != task.shape or len(weights.b_y) != task.classes:
            raise ValueError(
                f"images of shape {task.shape} and {task.classes} classes do not fit weights of "
                f"images of shape {weights.sample_shape} and {len(weights.b_y)} outputs"
            )
        model = cls._hold(PooledEquilibriumConv2d.from_weights(weights, **options), task)
        model.stem = InvertibleDownsampling(1)
        return model

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.normalize, self.stem, self.layer

    @property
    def bounds(self) -> tuple[Bound, ...]:
        return ("promised", "scaled") if self.gamma is None else ("promised",)

    def _certificate(self, bound: Bound) -> ChainCertificate:
        if bound == "promised":
            return super()._certificate(bound)
        weights = self.layer.weights()
        return self._extend_to_network(certify(weights, tighten_pooled(weights)))


_FLATTEN = Flatten()


def activation(name: ActivationName) -> ProximalActivation:
    """Return the activation of a configuration."""
    known: dict[str, ProximalActivation] = {
        "relu": ReLU(),
        "leaky_relu": LeakyReLU(),
        "tanh": Tanh(),
    }
    if name not in known:
        raise ValueError(f"activation must be one of {', '.join(known)}, got {name!r}")
    return known[name]
