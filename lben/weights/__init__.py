"""What is a layer once its parameterization is gone? Weights, one class per structure.

Symbols: docs/glossary.md.
"""

from lben.weights.base import (
    Rates,
    Rounding,
    Weights,
    as_number,
    check_dimensions,
    check_epsilon,
    check_gamma,
    check_tensors,
    convert,
    digest,
)
from lben.weights.convolutional import ConvolutionalWeights
from lben.weights.dense import DenseWeights, stack
from lben.weights.image import ImageGeometry
from lben.weights.pooled import PooledWeights

__all__ = [
    "ConvolutionalWeights",
    "DenseWeights",
    "ImageGeometry",
    "PooledWeights",
    "Rates",
    "Rounding",
    "Weights",
    "as_number",
    "check_dimensions",
    "check_epsilon",
    "check_gamma",
    "check_tensors",
    "convert",
    "digest",
    "stack",
]
