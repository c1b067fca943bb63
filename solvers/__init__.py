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
from solvers.flow import NeuralODE
from solvers.implicit import equilibrium
from solvers.inclusion import Inclusion, NonFiniteError
from solvers.loop import Splitting, State
from solvers.method import Method, Outcome, Request
from solvers.operators import (
    Constants,
    DenseOperator,
    LinearOperator,
    Map,
    NotMonotoneError,
    Resolvent,
)
from solvers.solution import Solution, SolveError, SolveWarning, Stats, Status
from solvers.solve import solve
from solvers.splitting import DouglasRachford, ForwardBackward, PeacemanRachford
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
    "Map",
    "Method",
    "NeuralODE",
    "NonFiniteError",
    "NotMonotoneError",
    "Outcome",
    "PeacemanRachford",
    "ProximalActivation",
    "ReLU",
    "Request",
    "Resolvent",
    "Sigmoid",
    "Softplus",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Splitting",
    "State",
    "Stats",
    "Status",
    "StepSizeRule",
    "Tanh",
    "equilibrium",
    "solve",
]
