"""When does the loop of a splitting in PyTorch look, and when does it stop?

A `Splitting` prepares a state, advances it and reads z from it. It never loops: `drive` does, for
all of them: stopping per sample, leaving of finished samples, and statistics.
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
    """Iterate of a splitting; tensors are updated in place.

    Attributes:
        x: the variable that is iterated, samples × n.
        map: the linear part of one step.
        shift: the constant term, samples × n.
        apply: the activation's part of one step; it may overwrite its argument.
        spare: scratch of the shape of x.
    """

    x: Tensor
    map: Map
    shift: Tensor
    apply: Callable[[Tensor], Tensor]
    spare: Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class Splitting(Method):
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

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Iterate in PyTorch until every sample is done."""
        return drive(problem, self, request)


# Note [When to look]
# A check costs one product and a host synchronisation. The first comes after FIRST_CHECK steps;
# from two residuals, the first of them 1 at the start, the rate predicts where the slowest sample
# will pass, and the next check is put there, but never at more than twice the steps done so far.
# Finished samples leave when at least half of the batch is done: below that, gathering costs more
# than it saves. The loop stops early when the worst residual has not halved while the steps grew by
# a quarter and 64, and is within STALL roundoffs or rounding explains what is above the tolerance.
# In float32 a sample leaves where 16 roundoffs of v are more than tol and explain what is left, and
# the residual has not halved since the last check: float64 goes on from there, at less cost than
# the steps that show that nothing moves.
_LEAVE_SHARE = 0.5


def drive(problem: Inclusion, method: Splitting, request: Request) -> Outcome:
    """Advance `method` until every sample's residual is within tolerance, or cannot be."""
    tol, max_steps = request.tol, request.max_steps
    samples, device = problem.bias.shape[0], problem.bias.device
    value = torch.empty_like(problem.bias)
    residual = torch.zeros(samples, dtype=problem.bias.dtype, device=device)
    steps = torch.zeros(samples, dtype=torch.long, device=device)
    open_samples: Tensor | None = None  # None while all are in the batch
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
        r, floor = problem.measure(z) if single else (problem.relative_residual(z), 0.0)
        left = torch.where((floor > tol) & (r > 0.5 * before), r - floor, r) if single else r
        before = r
        checks += 1
        # The one host synchronisation; NaN propagates through max. Finished samples that are still
        # in the batch have their answer: what they do now does not matter.
        worst = float(torch.where(finished, 0.0, left).max())
        last = worst <= tol or done_steps >= max_steps or not math.isfinite(worst)
        if not last and stall.at_rest(done_steps, worst):
            last = worst <= limit or bool((finished | problem.rests(z, tol)).all())
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
            keep = (~finished).nonzero().squeeze(-1)
            open_samples = keep if open_samples is None else open_samples[keep]
            problem, x = problem.select(keep), state.x[keep]
            state = method.init(problem, None)
            state.x, finished, before = x, finished[keep], before[keep]
        next_check = _predict(done_steps, worst, steps_before, worst_before, tol, max_steps)
        worst_before, steps_before = worst, done_steps


@dataclass
class _Stall:
    """Notices that the worst residual has come to rest."""

    mark: float = math.inf
    mark_steps: int = 0

    def at_rest(self, steps: int, worst: float) -> bool:
        if steps < self.mark_steps * 5 // 4 + 64:
            return False
        resting = worst > 0.5 * self.mark
        self.mark, self.mark_steps = worst, steps
        return resting


def _predict(
    done: int, worst: float, before: int, worst_before: float, tol: float, max_steps: int
) -> int:
    ahead = done
    if 0 < worst < worst_before:
        rate = math.log(worst / worst_before) / (done - before)
        ahead = max(1, min(done, math.ceil(math.log(tol / worst) / rate)))
    return min(done + ahead, max_steps)
