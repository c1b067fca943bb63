"""What is every classifier, whatever it is made of? Images in [0, 1] to certified logits."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.certificates import NetworkCertificate
from lben.layers import EquilibriumLayer, Normalize
from lben.radii import certified_radius


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedLogits:
    """Logits with a proved bound of their distance to the exact network's.

    Attributes:
        logits: y.
        error: bound of ‖y − y*‖₂ per sample.
        steps: most solver iterations that a sample needed; 0 for an explicit network.
    """

    logits: Float[Tensor, "batch classes"]
    error: Float[Tensor, " batch"]
    steps: int


class ClassifierConfig(Protocol):
    """What training and checkpoints need of a configuration: a frozen dataclass that builds."""

    def build(self) -> Classifier:
        """Return a freshly initialised model."""
        ...


class Classifier(nn.Module, ABC):
    """Normalisation and a network with a proved bound.

    Args:
        shape: channels, height, width of the images.
        mean, std: per channel, of the normalisation.
    """

    config: Any

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
    def tightens(self) -> bool:
        """Whether `certificate` can prove less than was promised."""

    @abstractmethod
    def certificate(self, *, tightened: bool = False) -> NetworkCertificate:
        """Prove the bound of the whole network from pixels to logits.

        Args:
            tightened: prove the least bound that the weights are known to support.

        Raises:
            CertificateError: if the proof fails.
        """

    @abstractmethod
    def certified_logits(
        self, x: Float[Tensor, "batch channels height width"], certificate: NetworkCertificate
    ) -> CertifiedLogits:
        """Return logits with a bound of their l2 distance to the exact network's.

        The exact network is the one with these float64 weights, solved exactly and without
        rounding; the bound covers solver error and float64 rounding from pixels to logits.

        Raises:
            ValueError: if the model is not float64 (`model.double()` converts it).
        """

    def prepared(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return the normalised images of a float64 model, or raise."""
        dtype = next(self.parameters()).dtype
        if dtype != torch.float64:
            raise ValueError(
                f"certified logits are evaluated in float64, the model is {dtype}: "
                "use model.double()"
            )
        return self._normalized(x)

    def exact(self, tol: float) -> Self:
        """Return a copy for evaluation: float64, on the CPU, solved to `tol` or raising."""
        exact = copy.deepcopy(self).to("cpu", torch.float64).eval()
        for layer in exact.modules():
            if isinstance(layer, EquilibriumLayer):
                layer.tol, layer.on_failure = tol, "raise"
                layer.max_steps = 20 * layer.max_steps
        return exact

    def certified_radius(
        self,
        x: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        certificate: NetworkCertificate | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of pixels in [0, 1]; 0 where misclassified."""
        certificate = self.certificate() if certificate is None else certificate
        result = self.certified_logits(x, certificate)
        return certified_radius(
            result.logits, labels, certificate.radius_bound(), logit_error=result.error
        )
