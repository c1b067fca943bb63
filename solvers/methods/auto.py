"""Which method solves this problem fastest?

`Auto` chooses by W, σ, dtype and device; its docstring lists the cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from solvers import backends
from solvers.activations import PIECEWISE_LINEAR
from solvers.backends.step import Outcome, Request
from solvers.inclusion import Inclusion
from solvers.methods.base import Method
from solvers.methods.block_substitution import BlockSubstitution
from solvers.methods.newton import SemismoothNewton
from solvers.methods.splitting import DouglasRachford, PeacemanRachford
from solvers.methods.step_size import Determinant, InverseGeometricMean
from solvers.operators import BlockTriangularOperator, DenseOperator

_NEWTON_COST = 500
"""About how many steps of a splitting cost as much as one Newton step; see `SemismoothNewton`."""
_LARGE = 4096
"""With more units than this one LU per sample takes too long, and too much memory."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Auto(Method):
    """Choose a method by what is known of the problem; the solution names the choice.

    - Weights that are not strongly monotone (m ≤ 0), if `require_monotone=False` admits them:
      `DouglasRachford`, whose guarantee includes m = 0.
    - Block triangular W, as of multilayer networks: `BlockSubstitution`.
    - Dense W and piecewise linear σ in float64 on a CPU without a compiled loop:
      `SemismoothNewton`, 200 steps of Peaceman–Rachford and then Newton's (1.7 to 2.2 times as fast
      at m = 0.01).
    - Everything else: `PeacemanRachford`, which converges at any step size, in a fused loop if
      there is one.
    - Adjoint problems with dense W on a CPU: Peaceman–Rachford for as many steps as cost one LU per
      sample on its active units, then that LU. This is `SemismoothNewton(patience=500)` in the
      compiled loop (measured: 350 to 600 steps at n from 80 to 1000) and `patience=100` in PyTorch
      (65 to 130). Forward and adjoint solves need about the same number of steps; so if the forward
      one took more than that, the LU comes at once (patience=0).

    If samples miss their tolerance, one more method continues from where they are (`fallbacks`).
    The solution then names both methods.

    Two methods are never chosen, because they won no measurement: forward–backward (2 to 100 times
    as many steps of the same cost) and Anderson acceleration (at n ≤ 1000 on a CPU its vector
    operations cost more than the products that it saves).

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), Auto(), tol=1e-6).method
        'PeacemanRachford()'
    """

    def choose(self, problem: Inclusion) -> Method:
        """Return the method for this problem."""
        if not problem.operator.is_monotone():
            return DouglasRachford(step_size=Determinant())
        if isinstance(problem.operator, BlockTriangularOperator):
            return BlockSubstitution()
        v = problem.bias
        if v.dtype == torch.float64 and v.device.type == "cpu" and _has_active_set(problem):
            return (
                PeacemanRachford()
                if backends.find_obstacle(problem) is None
                else SemismoothNewton()
            )
        return PeacemanRachford()

    def choose_adjoint(self, forward_steps: float, problem: Inclusion) -> Method:
        """Return the method for an adjoint problem.

        Args:
            forward_steps: mean number of steps of the forward solve.
            problem: the adjoint problem.
        """
        if problem.bias.device.type != "cpu" or not _has_active_set(problem):
            return self
        patience = 500 if backends.find_obstacle(problem) is None else 100
        return SemismoothNewton(patience=0 if forward_steps > patience else patience)

    def fallbacks(self, problem: Inclusion, request: Request) -> tuple[Method, ...]:
        """Return the method that continues on samples that the chosen one missed, if any can.

        For piecewise linear σ it is Newton's method, which solves for the active units exactly,
        whatever the spectrum of W is. It succeeds where the eigenvalues lie so far apart that no
        step size serves all of them. It also succeeds where z is so much smaller than v that an
        iteration, which adds v, rounds z away. For other σ and for very large W it is
        Peaceman–Rachford at the step size of its best guarantee. If `max_steps` is below
        `_NEWTON_COST` there is no fallback, because a Newton step would cost more than was granted.
        """
        if request.max_steps < _NEWTON_COST:
            return ()
        if isinstance(problem.activation, PIECEWISE_LINEAR) and problem.operator.n <= _LARGE:
            return (SemismoothNewton(patience=0),)
        if problem.operator.constants().m > 0:
            return (PeacemanRachford(step_size=InverseGeometricMean()),)
        return ()

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Solve by the chosen method."""
        return self.choose(problem).run(problem, request)


def _has_active_set(problem: Inclusion) -> bool:
    return isinstance(problem.operator, DenseOperator) and isinstance(
        problem.activation, PIECEWISE_LINEAR
    )
