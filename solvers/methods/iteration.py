"""When does the loop of a splitting in PyTorch evaluate the residual, and when does it stop?

A `Splitting` prepares a state, advances it and reads z from it. The loop is `iterate`, the same for
all splittings: it stops sample by sample, takes finished samples out of the batch, and counts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.backends.step import FIRST_CHECK, STALL, Outcome, Request
from solvers.inclusion import Inclusion
from solvers.methods.base import Method
from solvers.operators import Map


@dataclass
class State:
    """Hold the iterate of a splitting; its tensors are updated in place.

    Args:
        x: the variable that is iterated, batch × n.
        map: M, the linear part of one step.
        shift: the constant term of one step, batch × n.
        apply: the activation's part of one step; it may overwrite its argument.
        spare: memory of the shape of x whose content does not matter.

    Example:
        >>> from solvers import DenseOperator, PeacemanRachford, ReLU
        >>> problem = Inclusion(DenseOperator(torch.zeros(2, 2)), torch.ones(1, 2), ReLU())
        >>> PeacemanRachford(step_size=1.0).init(problem, None).x  # αv
        tensor([[1., 1.]])
    """

    x: Tensor
    map: Map
    shift: Tensor
    apply: Callable[[Tensor], Tensor]
    spare: Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class Splitting(Method):
    """Find z by advancing an iterate step by step; a subclass gives the step, not the loop.

    Between steps only `State.x` lasts: `init` is called again when finished samples leave. A method
    with more memory (momentum, Halpern's anchor) extends `Method` and loops by itself.

    Example:
        >>> from dataclasses import dataclass
        >>> from solvers import DenseOperator, ForwardBackward, ReLU, solve
        >>> @dataclass(frozen=True, kw_only=True, repr=False)
        ... class Cautious(ForwardBackward):
        ...     def step(self, problem, state):
        ...         before = state.x.clone()
        ...         state = super().step(problem, state)
        ...         state.x.lerp_(before, 0.1)
        ...         return state
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> method = Cautious(step_size=0.5, compiled=False)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), method, tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    @abstractmethod
    def init(self, problem: Inclusion, z0: Float[Tensor, "batch n"] | None) -> State:
        """Return the first state for a problem of batch × n, from z0 or from a cold start."""

    @abstractmethod
    def step(self, problem: Inclusion, state: State) -> State:
        """Advance the state by one iteration, in place where that is faster, and return it."""

    @abstractmethod
    def value(self, problem: Inclusion, state: State) -> Float[Tensor, "batch n"]:
        """Return the current estimate of z, in new memory."""

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Iterate in PyTorch until every sample is done."""
        return iterate(problem, self, request)


# Note [When to check]
# A check costs one product and a host synchronisation. The first one comes after FIRST_CHECK steps.
# The last two residuals (1 at step 0) give a rate, which predicts the step at which the slowest
# sample will pass. The next check is put there, but at no more than twice the steps done so far.
# Finished samples are taken out when at least half of the batch is finished; below that, gathering
# costs more than it saves. The loop stops early if the worst residual has not halved while the
# number of steps grew by a quarter and 64, and either it is within STALL roundoffs or rounding
# explains its excess over the tolerance. A float32 sample is taken out early if 16 roundoffs of v
# exceed tol and explain its residual, and that has not halved since the last check: float64 then
# continues from there, which costs less than the steps that would show that nothing moves.
_LEAVE_SHARE = 0.5


def iterate(problem: Inclusion, method: Splitting, request: Request) -> Outcome:
    """Advance a splitting until every sample is within its tolerance, or cannot be.

    Args:
        problem: of shape batch × n, cut from the graph.
        method: whose steps are taken.
        request: tolerance, step limit and start.

    Returns:
        z, residuals in the Λ norm and steps per sample.
    """
    tol, max_steps = request.tol, request.max_steps
    samples, device = problem.bias.shape[0], problem.bias.device
    value = torch.empty_like(problem.bias)
    residual = torch.zeros(samples, dtype=problem.bias.dtype, device=device)
    steps = torch.zeros(samples, dtype=torch.long, device=device)
    open_samples: Tensor | None = None  # None while all samples are in the batch
    if samples == 0:
        return Outcome(value=value, residual=residual, steps=steps, checks=0)

    state = method.init(problem, request.z0)
    done_steps, checks, worst_before, steps_before = 0, 0, 1.0, 0
    stall, limit = _Stall(), STALL * torch.finfo(problem.bias.dtype).eps
    next_check = min(FIRST_CHECK, max_steps)
    single, before = problem.bias.dtype == torch.float32, torch.full_like(residual, torch.inf)
    finished = torch.zeros(samples, dtype=torch.bool, device=device)
    while True:
        while done_steps < next_check:
            state = method.step(problem, state)
            done_steps += 1
        z = method.value(problem, state)
        r, floor = (
            problem.residual_and_roundoff(z) if single else (problem.relative_residual(z), 0.0)
        )
        left = torch.where((floor > tol) & (r > 0.5 * before), r - floor, r) if single else r
        before = r
        checks += 1
        # The one host synchronisation; NaN propagates through max. Finished samples that are still
        # in the batch have their answer: what they do now does not matter.
        worst = float(torch.where(finished, 0.0, left).max())
        last = worst <= tol or done_steps >= max_steps or not math.isfinite(worst)
        if not last and stall.is_at_rest(done_steps, worst):
            last = worst <= limit or bool((finished | problem.is_rounding_limited(z, tol)).all())
        if last and open_samples is None and not bool(finished.any()):
            return Outcome(value=z, residual=r, steps=steps.fill_(done_steps), checks=checks)
        newly = (torch.ones_like(finished) if last else left <= tol) & ~finished
        rows = newly.nonzero().squeeze(-1)
        target = rows if open_samples is None else open_samples[rows]
        value[target], residual[target], steps[target] = z[rows], r[rows], done_steps
        if last:
            return Outcome(value=value, residual=residual, steps=steps, checks=checks)
        finished |= newly
        if float(finished.float().mean()) >= _LEAVE_SHARE:
            rest = (~finished).nonzero().squeeze(-1)
            open_samples = rest if open_samples is None else open_samples[rest]
            problem, x = problem.select(rest), state.x[rest]
            state = method.init(problem, None)
            state.x, finished, before = x, finished[rest], before[rest]
        next_check = _predict_next_check(
            done_steps, worst, steps_before, worst_before, tol, max_steps
        )
        worst_before, steps_before = worst, done_steps


@dataclass
class _Stall:
    """Notice that the worst residual has stopped falling."""

    mark: float = math.inf
    mark_steps: int = 0

    def is_at_rest(self, steps: int, worst: float) -> bool:
        if steps < self.mark_steps * 5 // 4 + 64:
            return False
        at_rest = worst > 0.5 * self.mark
        self.mark, self.mark_steps = worst, steps
        return at_rest


def _predict_next_check(
    done: int, worst: float, before: int, worst_before: float, tol: float, max_steps: int
) -> int:
    ahead = done
    if 0 < worst < worst_before:
        rate = math.log(worst / worst_before) / (done - before)
        ahead = max(1, min(done, math.ceil(math.log(tol / worst) / rate)))
    return min(done + ahead, max_steps)
