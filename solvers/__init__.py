"""Monotone operator splitting for equilibria z = σ(Wz + v); knows no network."""

from solvers.acceleration import Anderson
from solvers.acceptance import Acceptance, acceptance
from solvers.activations import (
    LeakyReLU,
    LinearSlope,
    Masked,
    ProximalActivation,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
)
from solvers.auto import Auto
from solvers.budget import budgeted_equilibrium, refined_inverse, resolvent_inverse
from solvers.flow import NeuralODE
from solvers.gradient import (
    Gradient,
    ImplicitGradient,
    JacobianFreeGradient,
    PhantomGradient,
    TruncatedGradient,
)
from solvers.graphs import Graphed
from solvers.implicit import equilibrium
from solvers.inclusion import Inclusion, NonFiniteError
from solvers.loop import Splitting, State
from solvers.method import Method, Outcome, Request
from solvers.mixed import MixedPrecision
from solvers.newton import SemismoothNewton
from solvers.operators import (
    BlockTriangularOperator,
    Constants,
    ConvolutionOperator,
    DenseOperator,
    LinearOperator,
    LowRankOperator,
    LowRankUpdate,
    Map,
    NotMonotoneError,
    Resolvent,
    ZeroOperator,
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
from solvers.sweep import Sweep

__all__ = [
    "Acceptance",
    "Anderson",
    "Auto",
    "BlockTriangularOperator",
    "Constants",
    "ConvolutionOperator",
    "DenseOperator",
    "Determinant",
    "DouglasRachford",
    "ForwardBackward",
    "ForwardStep",
    "Gradient",
    "Graphed",
    "ImplicitGradient",
    "Inclusion",
    "InverseGeometricMean",
    "JacobiDeterminant",
    "JacobianFreeGradient",
    "LeakyReLU",
    "LinearOperator",
    "LinearSlope",
    "LowRankOperator",
    "LowRankUpdate",
    "Map",
    "Masked",
    "Method",
    "MixedPrecision",
    "NeuralODE",
    "NonFiniteError",
    "NotMonotoneError",
    "Outcome",
    "PeacemanRachford",
    "PhantomGradient",
    "ProximalActivation",
    "ReLU",
    "Request",
    "Resolvent",
    "SemismoothNewton",
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
    "Sweep",
    "Tanh",
    "TruncatedGradient",
    "ZeroOperator",
    "acceptance",
    "budgeted_equilibrium",
    "equilibrium",
    "refined_inverse",
    "resolvent_inverse",
    "solve",
]
