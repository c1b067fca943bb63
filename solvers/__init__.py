"""Find the equilibrium z = σ(Wz + v), bound its error, and differentiate it.

W is a `LinearOperator` that is stored in any form (dense, low rank, convolution, block triangular,
your own), v is one row per sample, and σ is a `ProximalActivation` such as `ReLU()`. Together they
are an `Inclusion`. The equilibrium exists and is unique if I − W is strongly monotone, that is if
⟨(I − W)z, z⟩_Λ ≥ m ‖z‖²_Λ for some m > 0, in the inner product of a diagonal metric Λ. Nothing here
knows of networks.

| question | answer |
|---|---|
| What is z? | `solve(problem)` |
| What is z, with a gradient? | `equilibrium(problem)`; other gradients than the exact one:
`Gradient` | | How wrong is z? | `Solution.error_bound`; before solving: `acceptance` |
| How is z computed in a CUDA graph? | `fixed_step_equilibrium` and `GraphedCallable` |
| How is one added? | subclass `Method`, `LinearOperator` or `ProximalActivation` |

Leave the choice of a method to `Auto()`, which is the default. To choose yourself:

- `PeacemanRachford()` is nearly always right: it converges for every step size if m > 0, takes one
  product per step and runs in a compiled loop.
- `SemismoothNewton()` reaches the last digits for piecewise linear σ, and solves hard adjoints.
- `DouglasRachford()` also converges for m = 0, if a solution exists.
- `BlockSubstitution()` is for block triangular W, as of multilayer networks.
- `ForwardBackward()` needs no factorization, but many steps if L/m is large.
- `MixedPrecision()` takes most products in low precision, for large dense W on CUDA devices.
- `Anderson()` accelerates a splitting, and `NeuralODE()` follows a flow; neither is faster here.

Example:
    >>> import torch
    >>> from solvers import DenseOperator, Inclusion, ReLU, solve
    >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
    >>> solution = solve(Inclusion(DenseOperator(W), v, ReLU()), tol=1e-6)
    >>> solution.value
    tensor([[0.4000, 1.2000]])
    >>> solution.method, solution.converged
    ('PeacemanRachford()', True)
"""

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
