"""nn.Modules: a parameterization and its evaluation."""

from lben.layers.companions import (
    AveragePooling,
    ChannelPadding,
    Companion,
    Flatten,
    GroupSort,
    Householder,
    InvertibleDownsampling,
    NormPooling,
)
from lben.layers.conversion import feedback, from_explicit
from lben.layers.equilibrium import EquilibriumLayer
from lben.layers.equilibrium_dense import DenseEquilibriumLayer, EquilibriumLinear
from lben.layers.equilibrium_images import (
    EquilibriumConv2d,
    ImageEquilibriumLayer,
    PooledEquilibriumConv2d,
)
from lben.layers.explicit import ContractionLayer, ExplicitLayer, ResidualLayer, SandwichLayer
from lben.layers.family import (
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
from lben.layers.head import NormalizedLinear
from lben.layers.normalization import Normalize
from lben.layers.orthogonal import OrthogonalConv2d
from lben.layers.sequential import LipschitzSequential

__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "AveragePooling",
    "CPLConv2d",
    "CPLLinear",
    "ChannelPadding",
    "Companion",
    "ContractionLayer",
    "DenseEquilibriumLayer",
    "EquilibriumConv2d",
    "EquilibriumLayer",
    "EquilibriumLinear",
    "ExplicitLayer",
    "Flatten",
    "GroupSort",
    "Householder",
    "ImageEquilibriumLayer",
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
    "from_explicit",
]
