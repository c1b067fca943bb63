"""Linear maps W with what a splitting asks of them; one file per structure."""

from solvers.operators.base import LinearOperator
from solvers.operators.block_triangular import BlockTriangularOperator
from solvers.operators.convolution import ConvolutionOperator
from solvers.operators.dense import DenseOperator
from solvers.operators.fourier import Torus
from solvers.operators.low_rank import LowRankOperator
from solvers.operators.low_rank_update import LowRankUpdate
from solvers.operators.maps import Map, NotMonotoneError, Resolvent
from solvers.operators.matrix import Constants
from solvers.operators.zero import ZeroOperator

__all__ = [
    "BlockTriangularOperator",
    "Constants",
    "ConvolutionOperator",
    "DenseOperator",
    "LinearOperator",
    "LowRankOperator",
    "LowRankUpdate",
    "Map",
    "NotMonotoneError",
    "Resolvent",
    "Torus",
    "ZeroOperator",
]
