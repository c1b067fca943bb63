"""Which networks have a name? Frozen configurations, and `build`, which makes modules of them."""

from lben.models.base import Bound, CertifiedLogits, Classifier, ClassifierConfig, Promise
from lben.models.equilibrium import (
    ActivationName,
    ConvolutionalEquilibriumClassifier,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifier,
    EquilibriumClassifierConfig,
)
from lben.models.feedforward import (
    Block,
    FeedforwardClassifier,
    FeedforwardClassifierConfig,
    Head,
    Size,
    published_architecture,
)

__all__ = [
    "ActivationName",
    "Block",
    "Bound",
    "CertifiedLogits",
    "Classifier",
    "ClassifierConfig",
    "ConvolutionalEquilibriumClassifier",
    "ConvolutionalEquilibriumClassifierConfig",
    "EquilibriumClassifier",
    "EquilibriumClassifierConfig",
    "FeedforwardClassifier",
    "FeedforwardClassifierConfig",
    "Head",
    "Promise",
    "Size",
    "published_architecture",
]
