"""Which loss rewards margins? Frozen callables from logits and labels to a scalar.

A certified radius is a margin yᵢ − yⱼ of the logits y, with i the label, divided by a Lipschitz
constant. The gradient of plain cross-entropy, the default, vanishes for a sample that is classified
well. The other losses set how large the margin shall be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lben.values import check_positive, conform

Logits = Float[Tensor, "batch classes"]
Labels = Int[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Mean of T·CE((s·y − o·eᵢ)/T, i): cross-entropy that asks for a margin of o.

    CE is cross-entropy, y are the logits, i is the label and eᵢ its unit vector. The offset o
    lowers the logit of the label, so the loss has a gradient until the margin exceeds o by a few T.
    Prach and Lampert (2022, AOL), section on the loss; Araujo et al. (2023, SLL), appendix, with T
    = 1/4 and o = (3/2)√2.

    Attributes:
        temperature: T, in units of logits; it divides the logits and multiplies the loss.
        offset: o, in units of logits.
        scale: s, factor on the logits alone: scale s is s times temperature 1/s (with offset 0).
    """

    temperature: float = 1.0
    offset: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        conform(self)
        check_positive(self, "temperature", "scale")
        if not 0 <= self.offset < math.inf:
            raise ValueError(f"offset must be at least 0 and finite, got {self.offset}")

    def __call__(self, logits: Logits, labels: Labels) -> Float[Tensor, ""]:
        """Return the loss.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        labels = _check_labels(logits, labels)
        own = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        held_out = (logits * self.scale - self.offset * own) / self.temperature
        return functional.cross_entropy(held_out, labels) * self.temperature


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """Mean of Σ_{j≠i} max(0, margin − yᵢ + yⱼ) / classes: no reward beyond the margin.

    Weston and Watkins (1999); `torch.nn.MultiMarginLoss`.

    Attributes:
        margin: in units of logits; √2·γ·r for a certified radius r under the bound γ.
    """

    margin: float

    def __post_init__(self) -> None:
        conform(self)
        check_positive(self, "margin")

    def __call__(self, logits: Logits, labels: Labels) -> Float[Tensor, ""]:
        """Return the loss.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        labels = _check_labels(logits, labels)
        return functional.multi_margin_loss(logits, labels, margin=self.margin)


@dataclass(frozen=True, kw_only=True)
class EMMA:
    """Efficient margin maximization: `emma` with K = √2·bound for every pair of classes.

    Attributes:
        radius: radius to be certified, in the l2 norm of pixels in [0, 1].
        bound: γ of the network from pixels to logits.
    """

    radius: float
    bound: float

    def __post_init__(self) -> None:
        conform(self)
        check_positive(self, "radius", "bound")

    def __call__(self, logits: Logits, labels: Labels) -> Float[Tensor, ""]:
        """Return the loss.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        pairs = torch.full((), math.sqrt(2) * self.bound, dtype=logits.dtype, device=logits.device)
        return emma(logits, labels, self.radius, pairs)


Loss = CrossEntropy | Hinge | EMMA


def emma(
    logits: Logits, labels: Labels, radius: float, pairs: Float[Tensor, "*classes_by_classes"]
) -> Float[Tensor, ""]:
    """Return the mean of CE(y + εK, i) with εⱼ = clip((yᵢ − yⱼ)/Kᵢⱼ, 0, radius), held constant.

    CE is cross-entropy, i the label. The logit of every wrong class j is raised by εⱼKᵢⱼ, the most
    that an adversary of radius εⱼ can gain. A class that already wins gets nothing. Otherwise the
    class gets a tie with the label as long as the certified radius is below `radius`; beyond, it
    gets the gain of `radius`. Hu, Zou, Wang, Leino and Fredrikson (2023, "Unlocking Deterministic
    Robustness Certification on ImageNet"), the definition of the EMMA loss.

    Args:
        logits: y.
        labels: i.
        radius: to be certified, in the norm of K.
        pairs: K, Lipschitz constants of yᵢ − yⱼ: one number for all, or classes × classes
            (its diagonal is not read); gradients pass into it.

    Returns:
        The mean loss.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    labels = _check_labels(logits, labels)
    classes = logits.shape[1]
    if tuple(pairs.shape) not in ((), (classes, classes)):
        raise ValueError(
            f"pairs must be one number or {classes} × {classes}, got shape {tuple(pairs.shape)}"
        )
    own = functional.one_hot(labels, classes).bool()
    K = pairs.expand(classes, classes)[labels].masked_fill(own, 1.0)
    with torch.no_grad():
        epsilon = ((logits.gather(1, labels[:, None]) - logits) / K).clamp(0, radius)
    return functional.cross_entropy(logits + epsilon * K, labels)


def _check_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Return labels as int64. Values are not read, because a read would make the host wait."""
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "expected logits (batch, classes ≥ 2) and one label per sample, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, got {labels.dtype}: take labels.long()")
    return labels.long()
