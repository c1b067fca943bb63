"""How is 0 ∈ (I − W)z − v + ∂f(z) solved, and when does the loop stop?

A `Splitting` is a frozen description of a method: it prepares a state, advances it and reads z
from it. It never loops. `solve` owns the loop: stopping per sample, leaving of finished samples,
statistics, and failure.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.inclusion import Inclusion
from solvers.solution import OnFailure, Solution, Stats, Status
from solvers.step_size import ForwardStep, JacobiDeterminant, StepSizeRule, resolve


@dataclass
class State:
    """Iterate of a splitting; tensors are updated in place.

    Attributes:
        x: the variable that is iterated, samples × n.
        matrix: transposed iteration matrix.
        shift: the constant term, samples × n.
        apply: the activation's part of one step.
        spare: scratch of the shape of x.
    """

    x: Tensor
    matrix: Tensor
    shift: Tensor
    apply: Callable[[Tensor], Tensor]
    spare: Tensor


@dataclass(frozen=True, kw_only=True)
class Splitting(ABC):
    """A method that advances an iterate towards the solution; it never loops."""

    @abstractmethod
    def init(self, problem: Inclusion, z0: Float[Tensor, "batch n"] | None) -> State:
        """Prepare the state for a two-dimensional problem, from z0 or from a cold start."""

    @abstractmethod
    def step(self, problem: Inclusion, state: State) -> State:
        """Advance by one iteration."""

    @abstractmethod
    def value(self, problem: Inclusion, state: State) -> Float[Tensor, "batch n"]:
        """Return the current estimate z, in new memory."""

    def likely_causes(self, problem: Inclusion) -> str:
        """Say why this method may have failed on this problem, with numbers."""
        constants = problem.operator.constants()
        if constants.m <= 0:
            return (
                f"Causes: the weights are not monotone in the Λ norm (m = {constants.m:.2g}); run "
                "the layer's certificate()."
            )
        return (
            f"Causes: {self._step_cause(problem, constants.m, constants.L)}the problem is hard "
            f"(m = {constants.m:.2g}, L = {constants.L:.2g}), so it needs more steps; or the "
            f"tolerance is below the rounding of {problem.bias.dtype}. "
            "Try more max_steps or float64."
        )

    def _step_cause(self, problem: Inclusion, m: float, L: float) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class SteppedSplitting(Splitting):
    """A splitting with a step size.

    Args:
        step_size: α > 0, or a rule that computes it from the operator.

    Raises:
        ValueError: if a numerical step size is not positive and finite.
    """

    step_size: float | StepSizeRule

    def __post_init__(self) -> None:
        step = self.step_size
        if not isinstance(step, StepSizeRule) and not (math.isfinite(step) and step > 0):
            raise ValueError(f"step_size must be positive and finite, got {step}")


@dataclass(frozen=True, kw_only=True)
class PeacemanRachford(SteppedSplitting):
    """Peaceman–Rachford splitting: ū = 2R_α(u + αv) − u, z = prox_{αf}(ū), u ← 2z − ū.

    Converges for every α > 0 when I − W is strongly monotone, with factor at most
    √(1 − 4αm/(1 + 2αm + α²L²)) in the Λ norm. Lions and Mercier (1979); for equilibrium
    networks Winston and Kolter (2020), section 3.3.

    One iteration is ū ← K r(ū) + 2R_α αv with K = 2R_α − I and the reflected prox r (for ReLU the
    absolute value): one product and one elementwise pass.
    """

    step_size: float | StepSizeRule = JacobiDeterminant()

    def init(self, problem: Inclusion, z0: Tensor | None) -> State:
        operator, v = problem.operator, problem.bias
        alpha = resolve(self.step_size, operator)
        twice, matrix = operator.memo(
            ("Peaceman-Rachford", self.step_size, operator.transposed),
            lambda: _reflected_resolvent(operator.resolvent(alpha).inverse),
        )
        reflect = problem.activation.reflector(alpha)
        alpha_v = v * alpha
        if z0 is None:
            # The point u = −αv has resolvent 0, so ū = αv: the first step needs no product.
            x = alpha_v.clone()
        else:
            # At the solution u = z + α((I − W)z − v); a z0 near it gives a u near it.
            u = z0 + alpha * (z0 - operator.affine(z0, v))
            x = torch.addmm(-u, u + alpha_v, twice)
        return State(x, matrix, alpha_v @ twice, reflect, torch.empty_like(x))

    def step(self, problem: Inclusion, state: State) -> State:
        u = state.apply(state.x)
        torch.addmm(state.shift, u, state.matrix, out=state.spare)
        state.x, state.spare = state.spare, u
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        alpha = resolve(self.step_size, problem.operator)
        return problem.activation.prox(state.x, alpha)


@dataclass(frozen=True, kw_only=True)
class DouglasRachford(PeacemanRachford):
    """Relaxed Douglas–Rachford splitting: u ← (1 − θ)u + θ T(u) with Peaceman–Rachford's map T.

    θ = ½ is Douglas–Rachford itself, θ = 1 Peaceman–Rachford. For θ < 1 it converges for every
    α > 0 as soon as I − W is monotone (m ≥ 0) and a solution exists; for m > 0 its factor is at
    most 1 − θ + θρ with Peaceman–Rachford's ρ, so it is the slower of the two there. Lions and
    Mercier (1979); Eckstein and Bertsekas (1992), Theorem 8.

    Args:
        relaxation: θ in (0, 1].
        step_size: as for `PeacemanRachford`.

    Raises:
        ValueError: if relaxation lies outside (0, 1].
    """

    relaxation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"relaxation must lie in (0, 1], got {self.relaxation}")

    def step(self, problem: Inclusion, state: State) -> State:
        u = state.apply(state.spare.copy_(state.x))
        state.x.lerp_(state.shift, self.relaxation)
        state.x.addmm_(u, state.matrix, alpha=self.relaxation)
        return state


@dataclass(frozen=True, kw_only=True)
class ForwardBackward(SteppedSplitting):
    """Forward–backward splitting: z ← prox_{αf}((1 − α)z + α(Wz + v)).

    Converges for 0 < α < 2m/L² with factor √(1 − 2αm + α²L²), m and L in the Λ norm. Passty
    (1979); for equilibrium networks Winston and Kolter (2020), section 3.3. With σ in place of
    the prox and α = 1 it is plain fixed-point iteration, which need not converge.
    """

    step_size: float | StepSizeRule = ForwardStep()

    def init(self, problem: Inclusion, z0: Tensor | None) -> State:
        operator = problem.operator
        alpha = resolve(self.step_size, operator)
        matrix = operator.memo(
            ("forward-backward", self.step_size, operator.transposed),
            lambda: _relaxed_map(operator.mv, alpha, operator.n, problem.bias),
        )
        x = torch.zeros_like(problem.bias) if z0 is None else z0.clone()
        activation = problem.activation
        return State(
            x, matrix, problem.bias * alpha, lambda p: activation.prox(p, alpha),
            torch.empty_like(x),
        )  # fmt: skip

    def step(self, problem: Inclusion, state: State) -> State:
        torch.addmm(state.shift, state.x, state.matrix, out=state.spare)
        state.x = state.apply(state.spare)
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        return state.x.clone()

    def _step_cause(self, problem: Inclusion, m: float, L: float) -> str:
        alpha, limit = resolve(self.step_size, problem.operator), 2 * m / L**2
        if isinstance(alpha, float) and alpha >= limit:
            return f"step size {alpha:.2g} is above 2m/L² = {limit:.2g}; "
        return f"forward–backward is slow here (2m/L² = {limit:.2g}; try PeacemanRachford()); "


def _reflected_resolvent(inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2Rᵀ and (2R − I)ᵀ, each contiguous for the product with rows of samples."""
    twice = (2 * inverse.T).contiguous()
    reflected = twice.clone()
    reflected.diagonal().sub_(1)
    return twice, reflected


def _relaxed_map(mv: Callable[[Tensor], Tensor], alpha: Step, n: int, like: Tensor) -> Tensor:
    """Return ((1 − α)I + αW)ᵀ."""
    identity = torch.eye(n, dtype=like.dtype, device=like.device)
    return identity * (1 - alpha) + mv(identity) * alpha


def solve(
    problem: Inclusion,
    method: Splitting | None = None,
    *,
    tol: float = 1e-4,
    max_steps: int = 500,
    z0: Float[Tensor, "*batch n"] | None = None,
    on_failure: OnFailure = "warn",
    name: str = "solve",
) -> Solution:
    """Solve z = σ(Wz + v) for every sample of the problem, without building a graph.

    Samples whose relative residual ‖z̃ − z‖_Λ / max(‖z̃‖_Λ, ‖z‖_Λ), z̃ = σ(Wz + v), is at most
    `tol` at a check are done and keep the z of that check.

    Args:
        problem: the inclusion; gradients do not flow (use `equilibrium` for that).
        method: a splitting; `PeacemanRachford()` when omitted.
        tol: relative tolerance in the Λ norm, per sample.
        max_steps: limit of iterations.
        z0: warm start, of the shape of the bias.
        on_failure: what to do when a sample misses its tolerance: "warn" or "raise".
        name: what messages call this solve.

    Returns:
        The solution with its evidence.

    Raises:
        ValueError: if shapes or dtypes of the problem disagree, tol is below what the dtype can
            hold, max_steps < 1, or z0 has another shape or dtype or is not finite.
        NonFiniteError: if the bias contains NaN or Inf.
        SolveError: on failure, when `on_failure` is "raise".
    """
    method = PeacemanRachford() if method is None else method
    problem.check()
    _check_options(problem, tol, max_steps, z0, on_failure)
    with torch.no_grad():
        shape = problem.bias.shape
        flat = problem.detach().flatten()
        start = None if z0 is None else z0.detach().reshape(flat.bias.shape)
        value, residual, steps, checks, status = _run(flat, method, tol, max_steps, start)
        solution = Solution(
            value=value.reshape(shape),
            status=status,
            stats=Stats(steps=steps.reshape(shape[:-1]), checks=checks),
            residual=residual.reshape(shape[:-1]),
            tol=tol,
            method=repr(method),
            name=name,
            likely_causes=lambda: method.likely_causes(flat),
            _error_bound=lambda: flat.error_bound(value).reshape(shape[:-1]),
        )
    return solution.report(on_failure)


def _check_options(
    problem: Inclusion, tol: float, max_steps: int, z0: Tensor | None, on_failure: str
) -> None:
    dtype = problem.bias.dtype
    smallest = 4 * torch.finfo(dtype).eps
    if not tol >= smallest:
        raise ValueError(
            f"tol = {tol:g} is below what {dtype} can hold ({smallest:.1e}): "
            "use a larger tolerance or float64"
        )
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if on_failure not in ("warn", "raise"):
        raise ValueError(f'on_failure must be "warn" or "raise", got {on_failure!r}')
    if z0 is not None:
        if z0.shape != problem.bias.shape or z0.dtype != dtype:
            raise ValueError(
                f"z0 must have shape {tuple(problem.bias.shape)} and dtype {dtype}, "
                f"got {tuple(z0.shape)} and {z0.dtype}"
            )
        if not bool(torch.isfinite(z0).all()):
            raise ValueError("z0 contains NaN or Inf")


# Note [When to look]
# A check costs one product and a host synchronisation. The first comes after _FIRST_CHECK steps;
# from two residuals the rate predicts where the slowest sample will pass, and the next check is
# put there, but never more than twice the steps done so far ahead. Finished samples leave when
# at least half of the batch is done: below that, gathering costs more than it saves.
_FIRST_CHECK = 6
_LEAVE_SHARE = 0.5


def _run(
    problem: Inclusion, method: Splitting, tol: float, max_steps: int, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int, Status]:
    samples, device = problem.bias.shape[0], problem.bias.device
    value = torch.empty_like(problem.bias)
    residual = torch.zeros(samples, dtype=problem.bias.dtype, device=device)
    steps = torch.zeros(samples, dtype=torch.long, device=device)
    open_samples: Tensor | None = None  # None while all are in the batch
    if samples == 0:
        return value, residual, steps, 0, Status.CONVERGED

    state = method.init(problem, z0)
    done_steps, checks, worst_before, steps_before = 0, 0, math.inf, 0
    next_check = min(_FIRST_CHECK, max_steps)
    finished = torch.zeros(samples, dtype=torch.bool, device=device)
    while True:
        while done_steps < next_check:
            state = method.step(problem, state)
            done_steps += 1
        z = method.value(problem, state)
        r = problem.relative_residual(z)
        checks += 1
        # The one host synchronisation; NaN propagates through max. Finished samples that are still
        # in the batch have their answer: what they do now does not matter.
        worst = float(torch.where(finished, 0.0, r).max())
        last = worst <= tol or done_steps >= max_steps or not math.isfinite(worst)
        if last and open_samples is None and not bool(finished.any()):
            status = _status(worst, tol)
            return z, r, steps.fill_(done_steps), checks, status
        newly = (torch.ones_like(finished) if last else r <= tol) & ~finished
        rows = newly.nonzero().squeeze(-1)
        target = rows if open_samples is None else open_samples[rows]
        value[target], residual[target], steps[target] = z[rows], r[rows], done_steps
        if last:
            return value, residual, steps, checks, _status(float(residual.max()), tol)
        finished |= newly
        if float(finished.float().mean()) >= _LEAVE_SHARE:
            keep = (~finished).nonzero().squeeze(-1)
            open_samples = keep if open_samples is None else open_samples[keep]
            problem, x = problem.select(keep), state.x[keep]
            state = method.init(problem, None)
            state.x, finished = x, finished[keep]
        next_check = _predict(done_steps, worst, steps_before, worst_before, tol, max_steps)
        worst_before, steps_before = worst, done_steps


def _status(worst: float, tol: float) -> Status:
    if worst <= tol:
        return Status.CONVERGED
    return Status.MAX_STEPS if math.isfinite(worst) else Status.DIVERGED


def _predict(
    done: int, worst: float, before: int, worst_before: float, tol: float, max_steps: int
) -> int:
    ahead = done
    if math.isfinite(worst_before) and 0 < worst < worst_before:
        rate = math.log(worst / worst_before) / (done - before)
        ahead = max(1, min(done, math.ceil(math.log(tol / worst) / rate)))
    elif math.isinf(worst_before):
        ahead = max(1, done // 2)
    return min(done + ahead, max_steps)
