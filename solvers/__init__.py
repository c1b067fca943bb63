"""Monotone operator splitting for equilibria z = σ(Wz + v); knows no network."""

from solvers.acceleration import Anderson
from solvers.activations import (
    LeakyReLU,
    LinearSlope,
    ProximalActivation,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
)
from solvers.implicit import equilibrium
from solvers.inclusion import Inclusion, NonFiniteError
from solvers.operators import Constants, DenseOperator, LinearOperator, Resolvent
from solvers.solution import Solution, SolveError, SolveWarning, Stats, Status
from solvers.splitting import DouglasRachford, ForwardBackward, PeacemanRachford, Splitting, solve
from solvers.step_size import (
    Determinant,
    ForwardStep,
    InverseGeometricMean,
    JacobiDeterminant,
    StepSizeRule,
)

__all__ = [
    "Anderson",
    "Constants",
    "DenseOperator",
    "Determinant",
    "DouglasRachford",
    "ForwardBackward",
    "ForwardStep",
    "Inclusion",
    "InverseGeometricMean",
    "JacobiDeterminant",
    "LeakyReLU",
    "LinearOperator",
    "LinearSlope",
    "NonFiniteError",
    "PeacemanRachford",
    "ProximalActivation",
    "ReLU",
    "Resolvent",
    "Sigmoid",
    "Softplus",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Splitting",
    "Stats",
    "Status",
    "StepSizeRule",
    "Tanh",
    "equilibrium",
    "solve",
]
