"""Monotone operator splitting for equilibria z = σ(Wz + v); knows no network."""

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
from solvers.backends.step import Outcome, Request
from solvers.cuda_graphs import GraphedCallable
from solvers.fixed_steps import fixed_step_equilibrium, refine_inverse, resolvent_inverse
from solvers.gradient import (
    Gradient,
    ImplicitGradient,
    JacobianFreeGradient,
    PhantomGradient,
    TruncatedGradient,
)
from solvers.implicit import equilibrium
from solvers.inclusion import Inclusion, NonFiniteError
from solvers.methods.anderson import Anderson
from solvers.methods.auto import Auto
from solvers.methods.base import Method
from solvers.methods.block_substitution import BlockSubstitution
from solvers.methods.iteration import Splitting, State
from solvers.methods.mixed_precision import MixedPrecision
from solvers.methods.neural_ode import NeuralODE
from solvers.methods.newton import SemismoothNewton
from solvers.methods.splitting import DouglasRachford, ForwardBackward, PeacemanRachford
from solvers.methods.step_size import (
    Determinant,
    ForwardStep,
    InverseGeometricMean,
    JacobiDeterminant,
    StepSizeRule,
)
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

__all__ = [
    "Acceptance",
    "Anderson",
    "Auto",
    "BlockSubstitution",
    "BlockTriangularOperator",
    "Constants",
    "ConvolutionOperator",
    "DenseOperator",
    "Determinant",
    "DouglasRachford",
    "ForwardBackward",
    "ForwardStep",
    "Gradient",
    "GraphedCallable",
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
    "Tanh",
    "TruncatedGradient",
    "ZeroOperator",
    "acceptance",
    "equilibrium",
    "fixed_step_equilibrium",
    "refine_inverse",
    "resolvent_inverse",
    "solve",
]
