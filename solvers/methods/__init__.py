"""Which methods find z? Splittings, Newton's method, flows, and the choice among them."""

from solvers.backends.step import Outcome, Request
from solvers.methods.anderson import Anderson
from solvers.methods.auto import Auto
from solvers.methods.base import Method, check_method
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

__all__ = [
    "Anderson",
    "Auto",
    "BlockSubstitution",
    "Determinant",
    "DouglasRachford",
    "ForwardBackward",
    "ForwardStep",
    "InverseGeometricMean",
    "JacobiDeterminant",
    "Method",
    "MixedPrecision",
    "NeuralODE",
    "Outcome",
    "PeacemanRachford",
    "Request",
    "SemismoothNewton",
    "Splitting",
    "State",
    "StepSizeRule",
    "check_method",
]
