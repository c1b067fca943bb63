"""Which networks have a name? Frozen configurations, and `build`, which makes modules of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.certificates import (
    NetworkCertificate,
    certified_radius,
    certify,
    compose,
    logit_error,
    tighten,
)
from lben.layers import EquilibriumLinear, Normalize
from solvers import LeakyReLU, ProximalActivation, ReLU, Tanh

ActivationName = Literal["relu", "leaky_relu", "tanh"]


class ClassifierConfig(Protocol):
    """What training and checkpoints need of a configuration: a frozen dataclass that builds."""

    def build(self) -> Classifier:
        """Return a freshly initialised model."""
        ...


class Classifier(nn.Module):
    """What training and checkpoints need of a model: images in [0, 1] to logits, with a proof."""

    def certificate(self) -> NetworkCertificate:
        """Prove the bound of the whole network from pixels to logits.

        Raises:
            CertificateError: if the proof fails.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EquilibriumClassifierConfig:
    """A fully connected equilibrium classifier of images in [0, 1].

    Attributes:
        shape: channels, height, width.
        classes: number of classes.
        mean: per channel, subtracted from the pixels.
        std: per channel, divides them; the bound in pixels is gamma / min(std).
        hidden: equilibrium units n.
        gamma: l2 Lipschitz bound on the normalised input; None for no bound.
        learn_metric: whether Λ is trained (False with gamma None is monDEQ).
        feedthrough: whether the output has a direct term Dx.
        activation: σ.
        epsilon: slack of the certificate.
        tol: relative tolerance of the solver during training.
        max_steps: iteration limit of the solver.
    """

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hidden: int = 80
    gamma: float | None = 1.0
    learn_metric: bool = True
    feedthrough: bool = False
    activation: ActivationName = "relu"
    epsilon: float = 1e-3
    tol: float = 1e-4
    max_steps: int = 5000

    def build(self) -> EquilibriumClassifier:
        """Return a freshly initialised model."""
        return EquilibriumClassifier(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedLogits:
    """Logits with a proved bound of their distance to the exact network's.

    Attributes:
        logits: y.
        error: bound of ‖y − y*‖₂ per sample.
        steps: most solver iterations that a sample needed.
    """

    logits: Float[Tensor, "batch classes"]
    error: Float[Tensor, " batch"]
    steps: int


class EquilibriumClassifier(Classifier):
    """Normalisation, flattening and one `EquilibriumLinear`: images in [0, 1] to logits."""

    def __init__(self, config: EquilibriumClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize(config.mean, config.std)
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

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return logits.

        Raises:
            ValueError: if the images have another shape or dtype, or contain NaN or Inf.
        """
        return self.layer(self._features(x))

    def _features(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.shape:
            raise ValueError(
                f"expected images of shape (batch, {', '.join(map(str, self.config.shape))}), "
                f"got {tuple(x.shape)}"
            )
        return self.normalize(x).flatten(1)

    def certificate(self, *, tightened: bool = False) -> NetworkCertificate:
        """Prove the bound of the whole network from pixels to logits.

        Args:
            tightened: prove the least bound that the layer's Λ supports instead of the promised
                one; the only bound there is when gamma is None.

        Raises:
            CertificateError: if the proof fails.
        """
        with torch.no_grad():
            weights = self.layer.weights()
            layer = certify(weights, tighten(weights) if tightened else None)
        return compose([layer], input_gain=self.normalize.gain)

    @torch.no_grad()
    def certified_logits(
        self, x: Float[Tensor, "batch channels height width"], certificate: NetworkCertificate
    ) -> CertifiedLogits:
        """Return logits with a bound of their l2 distance to the exact network's.

        The exact network is the one with these float64 weights, an exact equilibrium and no
        rounding; the bound covers solver error and float64 rounding from pixels to logits.

        Raises:
            ValueError: if the model is not float64 (`model.double()` converts it).
        """
        weights = self.layer.weights()
        if weights.W.dtype != torch.float64:
            raise ValueError(
                f"certified logits are evaluated in float64, the model is {weights.W.dtype}: "
                "use model.double()"
            )
        (proof,) = certificate.layers
        features = self._features(x)
        problem = self.layer.inclusion(features)
        solution = self.layer.equilibrium(features)
        state_error = problem.error_bound(solution.value, proof.constants)
        error = logit_error(weights, proof, features, solution.value, state_error)
        if math.isfinite(proof.bound):
            error = error + proof.bound * self.normalize.rounding(x)
        return CertifiedLogits(
            logits=self.layer.readout(features, solution.value),
            error=error,
            steps=solution.stats.max_steps,
        )

    def certified_radius(
        self,
        x: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        certificate: NetworkCertificate | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of pixels in [0, 1]; 0 where misclassified."""
        certificate = self.certificate() if certificate is None else certificate
        result = self.certified_logits(x, certificate)
        return certified_radius(result.logits, labels, certificate.bound, logit_error=result.error)


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
