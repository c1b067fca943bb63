"""How is the equilibrium reached as the limit of a neural ODE?

The state follows ż = T(z) − z with the forward–backward map T(z) = prox_{αf}((1 − α)z + α(Wz + v)),
which contracts with factor q = √(1 − 2αm + α²L²) < 1 for 0 < α < 2m/L²: two trajectories approach
each other like e^(−(1−q)t) in the Λ norm. The flow ż = σ(Wz + v) − z of a recurrent network need
not contract, although its equilibrium is unique. An example is W = [[0, −k], [k, 0]] with m = 1. At
D = diag(1, 0) the symmetric part of DW − I has the eigenvalue k/2 − 1; in any other diagonal metric
it has a larger one, there or at D = diag(0, 1). So for k ≥ 2 two trajectories need not approach
each other, and for k > 1 Euler's method with h = 1 spirals outwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from solvers.inclusion import Inclusion
from solvers.methods.iteration import Splitting, State
from solvers.methods.splitting import ForwardBackward
from solvers.methods.step_size import ForwardStep, StepSizeRule

# Per stage: where it evaluates the field, as a share of h along the slope of the stage before, and
# its weight in the step. Neither method uses an older slope.
_STAGES = {
    1: ((0.0, 1.0),),
    4: ((0.0, 1 / 6), (1 / 2, 1 / 3), (1 / 2, 1 / 3), (1.0, 1 / 6)),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class NeuralODE(Splitting):
    """Find z by an explicit Runge–Kutta method on ż = T(z) − z, T(z) = prox_{αf}((1 − α)z + α(Wz +
    v)).

    Order 1 is Euler's method, z ← (1 − h)z + hT(z), which is relaxed forward–backward splitting. It
    contracts with factor 1 − h(1 − q) in the Λ norm, where q is the factor of T.

    Order 4 is the classical method. Its proved factor is √(1 − h(1 − q²)/6), see Note [Circle
    contractivity]. For linear T the factor is at most R(−h(1 − q)) ≈ e^(−h(1−q)) with
    R(x) = 1 + x + x²/2 + x³/6 + x⁴/24, by von Neumann's inequality: as a polynomial in T,
    R(h(T − I)) has no negative coefficient for h ≤ 1. On random problems no activation was measured
    above R(−h(1 − q)). A step takes four products with W. So for the equilibrium alone order 1 with
    h = 1, which is `ForwardBackward`, costs less.
    Reference: Revay, Wang and Manchester (2020), equilibrium networks as limits of neural ODEs.

    Args:
        order: 1 or 4.
        time_step: h in (0, 1].
        step_size: α > 0, or a rule that computes it from the operator.

    Raises:
        ValueError: if the order is another, time_step lies outside (0, 1], or a numerical
            step_size is not positive and finite.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), NeuralODE(order=1), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    # Note [Circle contractivity]
    # If T is non-expansive, then ⟨Δk, Δy⟩ ≤ −½‖Δk‖² for k = T(y) − y. A Runge–Kutta method with
    # weights b > 0, B = diag b and matrix A does not enlarge ‖Δz‖ for such a field and h ≤ r if
    # BA + AᵀB − bbᵀ + B/r is positive semi-definite (Dahlquist and Jeltsch 1979); r = 1 for both
    # orders. If T has factor q, then 2⟨Δk, Δy⟩ ≤ −‖Δk‖² − (1 − q²)‖Δy‖², and the first stage (y =
    # z, weight 1/6) leaves ‖Δz₊‖² ≤ (1 − h(1 − q²)/6) ‖Δz‖² for order 4.

    order: Literal[1, 4] = 4
    time_step: float = 1.0
    step_size: float | StepSizeRule = ForwardStep()

    def __post_init__(self) -> None:
        if self.order not in _STAGES:
            raise ValueError(f"order must be 1 (Euler) or 4 (classical), got {self.order!r}")
        if not 0 < self.time_step <= 1:
            raise ValueError(f"time_step must lie in (0, 1], got {self.time_step}")
        self._map()  # checks the step size

    def _map(self) -> ForwardBackward:
        """Return the splitting whose step is T."""
        return ForwardBackward(step_size=self.step_size)

    def init(self, problem: Inclusion, z0: Tensor | None) -> State:
        return self._map().init(problem, z0)

    def step(self, problem: Inclusion, state: State) -> State:
        z, moved, slope = state.x, state.x.clone(), torch.zeros_like(state.x)
        for share, weight in _STAGES[self.order]:
            y = z.add(slope, alpha=share * self.time_step)
            slope = state.apply(state.map.add(y, state.shift, state.spare)) - y
            moved.add_(slope, alpha=weight * self.time_step)
        state.x = moved
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        if self.order == 1 and self.time_step == 1:
            return state.x.clone()  # itself a value of T
        # T(z) is no further from the equilibrium, and its inactive units are exactly 0: those of z
        # are averages of stages, and their slopes would be those of active units.
        return state.apply(state.map.add(state.x, state.shift, None))

    def step_cause(self, problem: Inclusion, m: float, L: float) -> str:
        return self._map().step_cause(problem, m, L)
