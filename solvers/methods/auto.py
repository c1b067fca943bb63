"""Which method solves this problem fastest?"""

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

_NEWTON_COSTS = 500
"""Steps of a splitting, at most; see `SemismoothNewton`."""
_LARGE = 4096
"""Units beyond which one LU per sample takes too long, and too much memory."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Auto(Method):
    """Choose by what is known of the problem; the solution names the choice.

    - Weights known not to be strongly monotone (m ≤ 0) that are to be solved all the same:
      `DouglasRachford`, whose guarantee reaches to m = 0.
    - Piecewise linear σ in float64 where there is no compiled loop: `SemismoothNewton`, which ends
      Peaceman–Rachford after 200 steps in PyTorch (1.7 to 2.2 times as fast at m = 0.01).
    - Block triangular W, as of multilayer nets: one `BlockSubstitution` over its blocks.
    - Everything else: `PeacemanRachford`, which converges at any step size, in the compiled loop
      where there is one.
    - Adjoint problems, dense on a CPU: Peaceman–Rachford for as many steps as one LU per sample on
      its active units costs, then that LU: `SemismoothNewton(patience=500)` in the compiled loop
      (measured: 350 to 600 at n from 80 to 1000), 100 in PyTorch (65 to 130). Where the forward
      solve took more steps than that, the LU at once (patience=0): both need about the same.

    Where samples are missed all the same, one more method goes on from where they are
    (`fallbacks`); the solution then names both.

    Never chosen, because they won no measurement: forward–backward (2 to 100 times the steps at
    the same cost) and Anderson acceleration (its vector operations cost more than the products
    that it saves at n ≤ 1000 on a CPU).
    """

    def choose(self, problem: Inclusion) -> Method:
        """Return the method for this problem."""
        if not problem.operator.is_monotone():
            return DouglasRachford(step_size=Determinant())
        if isinstance(problem.operator, BlockTriangularOperator):
            return BlockSubstitution()
        v = problem.bias
        if v.dtype == torch.float64 and v.device.type == "cpu" and _has_active_set(problem):
            return PeacemanRachford() if backends.supports(problem) is None else SemismoothNewton()
        return PeacemanRachford()

    def adjoint(self, forward_steps: float, problem: Inclusion) -> Method:
        """Return the method for an adjoint problem whose forward solve took so many steps."""
        if problem.bias.device.type != "cpu" or not _has_active_set(problem):
            return self
        patience = 500 if backends.supports(problem) is None else 100
        return SemismoothNewton(patience=0 if forward_steps > patience else patience)

    def fallbacks(self, problem: Inclusion, request: Request) -> tuple[Method, ...]:
        """Return what goes on where the method chosen stopped, if anything can.

        Newton's steps know the active units exactly, whatever the spectrum of W is: they arrive
        where the eigenvalues lie so far apart that no step size serves all of them, and where z is
        so much smaller than v that an iteration through all of v rounds it away. For other σ and
        very large W it is the step size of Peaceman–Rachford's best guarantee. Nothing where less
        than `_NEWTON_COSTS` steps were granted: a Newton step costs as much.
        """
        if request.max_steps < _NEWTON_COSTS:
            return ()
        if isinstance(problem.activation, PIECEWISE_LINEAR) and problem.operator.n <= _LARGE:
            return (SemismoothNewton(patience=0),)
        if problem.operator.constants().m > 0:
            return (PeacemanRachford(step_size=InverseGeometricMean()),)
        return ()

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Solve by the method chosen."""
        return self.choose(problem).run(problem, request)


def _has_active_set(problem: Inclusion) -> bool:
    return isinstance(problem.operator, DenseOperator) and isinstance(
        problem.activation, PIECEWISE_LINEAR
    )
