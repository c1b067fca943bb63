"""Which networks have a name? Each is a frozen configuration whose `build` makes the module."""

from lben.models.base import (
    Architecture,
    Bound,
    CertifiedLogits,
    Classifier,
    ClassifierConfig,
    Promise,
)
from lben.models.configuration import Images, ImageTask
from lben.models.equilibrium import (
    ActivationName,
    ConvolutionalEquilibriumArchitecture,
    ConvolutionalEquilibriumClassifier,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumArchitecture,
    EquilibriumClassifier,
    EquilibriumClassifierConfig,
)
from lben.models.feedforward import (
    Block,
    FeedforwardArchitecture,
    FeedforwardClassifier,
    FeedforwardClassifierConfig,
    Head,
    Size,
    published_architecture,
)

__all__ = [
    "ActivationName",
    "Architecture",
    "Block",
    "Bound",
    "CertifiedLogits",
    "Classifier",
    "ClassifierConfig",
    "ConvolutionalEquilibriumArchitecture",
    "ConvolutionalEquilibriumClassifier",
    "ConvolutionalEquilibriumClassifierConfig",
    "EquilibriumArchitecture",
    "EquilibriumClassifier",
    "EquilibriumClassifierConfig",
    "FeedforwardArchitecture",
    "FeedforwardClassifier",
    "FeedforwardClassifierConfig",
    "Head",
    "ImageTask",
    "Images",
    "Promise",
    "Size",
    "published_architecture",
]
