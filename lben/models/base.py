"""What is every classifier, whatever it is made of? Images in [0, 1] to certified logits."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.certificates import NetworkCertificate
from lben.layers import EquilibriumLayer, Normalize
from lben.radii import certified_radius
from solvers.dependencies import in_autocast

Bound = Literal["promised", "scaled", "pairs", "joint", "joint pairs"]
"""Which of its bounds a classifier proves: see `Classifier.certificate`."""


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
    def bounds(self) -> tuple[Bound, ...]:
        """Which bounds `certificate` can prove, from cheap to dear."""

    def certificate(self, bound: Bound = "promised") -> NetworkCertificate:
        """Prove a bound of the whole network from pixels to logits.

        Args:
            bound: "promised" by the parameterization (infinite where it promises none), or the
                least that the weights support: "scaled", with their own Λ up to a factor; "pairs",
                the same for every pair of logits; "joint", with the best Λ; "joint pairs".

        Raises:
            ValueError: if the model does not have this bound.
            CertificateError: if the proof fails.
        """
        if bound not in self.bounds:
            raise ValueError(f"this model has the bounds {', '.join(self.bounds)}, not {bound!r}")
        with torch.no_grad():
            return self._certificate(bound)

    @abstractmethod
    def _certificate(self, bound: Bound) -> NetworkCertificate:
        """Prove one of `bounds`."""

    @abstractmethod
    def certified_logits(
        self, x: Float[Tensor, "batch channels height width"], certificate: NetworkCertificate
    ) -> CertifiedLogits:
        """Return logits as the model runs, with a bound of their distance to the exact network's.

        The exact network has the weights that run, in float32 or float64, and is solved exactly and
        without rounding; the bound covers solver error and rounding from pixels to logits.

        Raises:
            ValueError: if the model is neither float32 nor float64.
        """

    def prepared(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return the normalised images of a model whose rounding is bounded, or raise."""
        dtype = next(self.parameters()).dtype
        if dtype not in (torch.float32, torch.float64) or in_autocast(x.device.type):
            raise ValueError(
                f"rounding is bounded in float32 and float64 without autocast, the model is {dtype}"
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
        *,
        sound: bool = True,
    ) -> Float[Tensor, " batch"]:
        """Return certified radii in the l2 norm of pixels in [0, 1]; 0 where misclassified.

        Args:
            x: images in [0, 1].
            labels: i.
            certificate: of this model; that of the promised bound when omitted.
            sound: whether solver error and rounding are taken off. Without them it is the textbook
                number, margin / bound of the logits as they come: for comparison with papers only,
                as it can be larger than the truth.
        """
        certificate = self.certificate() if certificate is None else certificate
        result = self.certified_logits(x, certificate)
        error = result.error if sound else 0.0
        return certified_radius(
            result.logits, labels, certificate.radius_bound(), logit_error=error
        )
