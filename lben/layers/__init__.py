"""Which torch.nn modules evaluate the weights of a parameterization? One per kind of layer.

Symbols: docs/glossary.md.
"""

from lben.layers.bounded import BoundedModule
from lben.layers.conversion import feedback
from lben.layers.equilibrium import EquilibriumLayer
from lben.layers.equilibrium_named import (
    EquilibriumConv2d,
    EquilibriumLinear,
    PooledEquilibriumConv2d,
)
from lben.layers.feedforward import ContractionLayer, FeedforwardLayer, ResidualLayer, SandwichLayer
from lben.layers.fixed import (
    AveragePooling,
    ChannelPadding,
    FixedMap,
    Flatten,
    GroupSort,
    Householder,
    InvertibleDownsampling,
    NormPooling,
)
from lben.layers.head import NormalizedLinear
from lben.layers.named import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from lben.layers.normalization import Normalize
from lben.layers.orthogonal import OrthogonalConv2d
from lben.layers.sequential import LipschitzSequential

__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "AveragePooling",
    "BoundedModule",
    "CPLConv2d",
    "CPLLinear",
    "ChannelPadding",
    "ContractionLayer",
    "EquilibriumConv2d",
    "EquilibriumLayer",
    "EquilibriumLinear",
    "FeedforwardLayer",
    "FixedMap",
    "Flatten",
    "GroupSort",
    "Householder",
    "InvertibleDownsampling",
    "LipschitzSequential",
    "NormPooling",
    "Normalize",
    "NormalizedLinear",
    "OrthogonalConv2d",
    "OrthogonalLinear",
    "PooledEquilibriumConv2d",
    "ResidualLayer",
    "SLLConv2d",
    "SLLLinear",
    "SandwichConv2d",
    "SandwichLayer",
    "SandwichLinear",
    "SpectralConv2d",
    "SpectralLinear",
    "feedback",
]
