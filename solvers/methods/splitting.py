"""Which splittings solve 0 ∈ (I − W)z − v + ∂f(z)?

Peaceman–Rachford, Douglas–Rachford and forward–backward. Each runs in a fused loop if there is one
for the problem (`solvers.backends`), else step by step in PyTorch (`solvers.methods.iteration`);
the results agree to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers import backends
from solvers.backends.step import Outcome, Request
from solvers.inclusion import Inclusion
from solvers.methods.iteration import Splitting, State
from solvers.methods.step_size import (
    ForwardStep,
    JacobiDeterminant,
    StepSizeRule,
    check_step_size,
    choose_step_size,
)
from solvers.operators import LinearOperator, Map


@dataclass(frozen=True, kw_only=True, repr=False)
class SteppedSplitting(Splitting):
    """Find z by a splitting that has a step size.

    Args:
        step_size: α > 0, or a rule that computes it from the operator.
        compiled: whether to iterate in a fused loop, which is compiled on a CPU and in Triton on a
            CUDA device; if omitted, wherever there is one.

    Raises:
        ValueError: if a numerical step size is not positive and finite; on solving, if
            `compiled=True` and there is no fused loop for the problem.
    """

    step_size: float | StepSizeRule
    compiled: bool | None = None

    def __post_init__(self) -> None:
        check_step_size(self.step_size)

    def iteration(self, problem: Inclusion) -> backends.Iteration | None:
        """Return one step as fused loops take it, or None if they know no such step."""
        return None

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Iterate until every sample is done, in a fused loop if there is one."""
        if self.compiled is False:
            return super().run(problem, request)
        reason, failure = backends.find_obstacle(problem), None
        if reason is None:
            iteration = self.iteration(problem)
            if iteration is None:
                reason = f"it does not know {type(self).__name__}"
            elif request.max_steps <= iteration.initial_steps:
                reason = "it enters with the first step done"
            else:
                found = backends.run(problem, iteration, request)
                if isinstance(found, Outcome):
                    return found
                reason = failure = found
        if self.compiled:
            raise ValueError(f"the compiled loop was demanded, but {reason}")
        outcome = super().run(problem, request)
        return outcome if failure is None else replace(outcome, fallback=failure)


@dataclass(frozen=True, kw_only=True, repr=False)
class PeacemanRachford(SteppedSplitting):
    """Find z by Peaceman–Rachford splitting: ū = 2R_α(u + αv) − u, z = prox_{αf}(ū), u ← 2z − ū.

    R_α = (I + α(I − W))⁻¹ is the resolvent. The splitting converges for every α > 0 if I − W is
    strongly monotone, with a factor of at most √(1 − 4αm/(1 + 2αm + α²L²)) per step in the Λ norm.

    One iteration is ū ← K r(ū) + (I + K) αv with K = 2R_α − I and r = 2 prox_{αf} − id (for ReLU
    the absolute value): one product and one elementwise pass. If a product is expensive, the
    iteration is ū ← K(r(ū) + αv) + αv, which saves the product (I + K) αv before the first step.
    Reference: Lions and Mercier (1979); for equilibrium networks Winston and Kolter (2020), section
    3.3.

    Args:
        step_size: α > 0, or a rule that computes it from the operator.
        compiled: whether to iterate in a fused loop; if omitted, wherever there is one.

    Raises:
        ValueError: as for every splitting with a step size: if a number is not positive and finite;
            on solving, if `compiled=True` and there is no fused loop for the problem.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), PeacemanRachford(), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    step_size: float | StepSizeRule = JacobiDeterminant()

    def init(self, problem: Inclusion, z0: Tensor | None) -> State:
        operator, v = problem.operator, problem.bias
        alpha = choose_step_size(self.step_size, operator)
        map_ = self._map(operator)
        alpha_v, reflect = v * alpha, problem.activation.reflector(alpha)
        # The point u = −αv has resolvent 0, so ū = αv: a cold start needs no product. At the
        # solution ū = z + α(Wz + v − z), so a z0 near the solution gives a ū near its ū.
        x = alpha_v.clone() if z0 is None else z0 + alpha * (operator.affine(z0, v) - z0)
        if map_.is_expensive:
            apply = backends.reflect_sum(problem, alpha, alpha_v)
            apply = apply or (lambda u: reflect(u).add_(alpha_v))
            return State(x, map_, alpha_v, apply, torch.empty_like(x))
        return State(x, map_, map_.add(alpha_v, alpha_v, None), reflect, torch.empty_like(x))

    def step(self, problem: Inclusion, state: State) -> State:
        u = state.apply(state.x)
        state.map.add(u, state.shift, state.spare)
        state.x, state.spare = state.spare, u
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        alpha = choose_step_size(self.step_size, problem.operator)
        return problem.activation.prox(state.x, alpha)

    def iteration(self, problem: Inclusion) -> backends.Iteration:
        """Return one step as fused loops take it."""
        alpha = choose_step_size(self.step_size, problem.operator)
        return backends.Iteration(map=self._map(problem.operator), alpha=alpha, reflected=True)

    def _map(self, operator: LinearOperator) -> Map:
        key = ("Peaceman-Rachford", self.step_size, operator.transposed)
        return operator.memo(
            key, lambda: operator.resolvent(choose_step_size(self.step_size, operator)).reflection()
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class DouglasRachford(PeacemanRachford):
    """Find z by relaxed Douglas–Rachford splitting: u ← (1 − θ)u + θ T(u).

    T is the map of one step of Peaceman–Rachford. θ = ½ is Douglas–Rachford itself, θ = 1 is
    Peaceman–Rachford. For θ < 1 the splitting converges for every α > 0 if I − W is monotone
    (m ≥ 0) and a solution exists. For m > 0 its factor is at most 1 − θ + θρ with
    Peaceman–Rachford's ρ, so there it is the slower of the two.
    Reference: Lions and Mercier (1979); Eckstein and Bertsekas (1992), Theorem 8.

    Args:
        relaxation: θ in (0, 1].
        step_size, compiled: as for `PeacemanRachford`.

    Raises:
        ValueError: if relaxation lies outside (0, 1], or as for `PeacemanRachford`.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), DouglasRachford(), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    relaxation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"relaxation must lie in (0, 1], got {self.relaxation}")

    def step(self, problem: Inclusion, state: State) -> State:
        u = state.apply(state.spare.copy_(state.x))
        state.x = state.x.lerp_(state.map.add(u, state.shift, None), self.relaxation)
        return state

    def iteration(self, problem: Inclusion) -> backends.Iteration:
        """Return one step as fused loops take it."""
        return replace(super().iteration(problem), relaxation=self.relaxation)


@dataclass(frozen=True, kw_only=True, repr=False)
class ForwardBackward(SteppedSplitting):
    """Find z by forward–backward splitting: z ← prox_{αf}((1 − α)z + α(Wz + v)).

    It converges for 0 < α < 2m/L² with factor √(1 − 2αm + α²L²) in the Λ norm, in which m and L are
    measured. At α = 1 it is the fixed-point iteration z ← σ(Wz + v), which need not converge.
    Reference: Passty (1979); for equilibrium networks Winston and Kolter (2020), section 3.3.

    Args:
        step_size, compiled: as for `PeacemanRachford`.

    Raises:
        ValueError: as for `PeacemanRachford`.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), ForwardBackward(), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    step_size: float | StepSizeRule = ForwardStep()

    def init(self, problem: Inclusion, z0: Tensor | None) -> State:
        alpha = choose_step_size(self.step_size, problem.operator)
        x = torch.zeros_like(problem.bias) if z0 is None else z0.clone()
        activation = problem.activation
        return State(
            x, self._map(problem.operator), problem.bias * alpha,
            lambda p: activation.prox(p, alpha), torch.empty_like(x),
        )  # fmt: skip

    def step(self, problem: Inclusion, state: State) -> State:
        state.x = state.apply(state.map.add(state.x, state.shift, state.spare))
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        return state.x.clone()

    def iteration(self, problem: Inclusion) -> backends.Iteration:
        """Return one step as fused loops take it."""
        alpha = choose_step_size(self.step_size, problem.operator)
        return backends.Iteration(map=self._map(problem.operator), alpha=alpha, reflected=False)

    def _map(self, operator: LinearOperator) -> Map:
        key = ("forward-backward", self.step_size, operator.transposed)
        return operator.memo(
            key, lambda: operator.relax(choose_step_size(self.step_size, operator))
        )

    def step_cause(self, problem: Inclusion, m: float, L: float) -> str:
        alpha, limit = choose_step_size(self.step_size, problem.operator), 2 * m / L**2
        if isinstance(alpha, float) and alpha >= limit:
            return f"step size {alpha:.2g} is above 2m/L² = {limit:.2g}; "
        return f"forward–backward is slow here (2m/L² = {limit:.2g}; try PeacemanRachford()); "
