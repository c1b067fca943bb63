"""nn.Modules: a parameterization and its evaluation."""

from lben.layers.equilibrium import EquilibriumLinear
from lben.layers.normalization import Normalize

__all__ = ["EquilibriumLinear", "Normalize"]
