"""A fully connected equilibrium classifier: what is it made of, and what does it prove?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates import NetworkCertificate, certify, compose
from lben.layers import EquilibriumLinear
from lben.models.base import CertifiedLogits, Classifier
from lben.radii import logit_error
from lben.tightening import tighten
from solvers import LeakyReLU, ProximalActivation, ReLU, Tanh

ActivationName = Literal["relu", "leaky_relu", "tanh"]


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


class EquilibriumClassifier(Classifier):
    """Normalisation, flattening and one `EquilibriumLinear`: images in [0, 1] to logits."""

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

    def logits(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        return self.layer(x.flatten(1))

    @property
    def gamma(self) -> float | None:
        return self.layer.gamma

    @property
    def tightens(self) -> bool:
        return not self.config.feedthrough

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
        features = self.prepared(x).flatten(1)
        weights = self.layer.weights()
        (proof,) = certificate.layers
        proof.check(weights)
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
