"""Free tensors to `DenseWeights`: maps whose range satisfies the certificate by construction."""

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
