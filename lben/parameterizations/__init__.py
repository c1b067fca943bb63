"""Free tensors to weights: maps whose values satisfy the certificate by construction.

A certificate does not rely on that: `certify` proves the weights themselves. Symbols:
docs/glossary.md.
"""

from lben.parameterizations.complete import CompleteParameterization
from lben.parameterizations.contraction import ContractionParameterization
from lben.parameterizations.convolutional import (
    ConvolutionalParameterization,
    PooledParameterization,
)
from lben.parameterizations.direct import DirectParameterization
from lben.parameterizations.equilibrium import EquilibriumParameterization
from lben.parameterizations.feedforward import FeedforwardParameterization
from lben.parameterizations.fixed import FixedWeights
from lben.parameterizations.multipliers import Gershgorin, MultiplierRule, Orthonormal
from lben.parameterizations.orthogonal import CayleyRows
from lben.parameterizations.residual import ResidualParameterization
from lben.parameterizations.sandwich import SandwichParameterization
from lben.parameterizations.spectral import Spectral

__all__ = [
    "CayleyRows",
    "CompleteParameterization",
    "ContractionParameterization",
    "ConvolutionalParameterization",
    "DirectParameterization",
    "EquilibriumParameterization",
    "FeedforwardParameterization",
    "FixedWeights",
    "Gershgorin",
    "MultiplierRule",
    "Orthonormal",
    "PooledParameterization",
    "ResidualParameterization",
    "SandwichParameterization",
    "Spectral",
]
