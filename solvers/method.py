"""What is a method, and what passes between it and `solve`?

`solve` checks the problem, hands it to a method as rows of samples without a graph, and reports
what came back. Everything that finds an equilibrium, a splitting, Newton's method or another
package's solver, is a `Method`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from solvers.inclusion import Inclusion
from solvers.solution import Loop, Status


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a method is asked for.

    Attributes:
        tol: relative tolerance in the Λ norm, per sample.
        max_steps: limit of iterations.
        z0: warm start.
    """

    tol: float
    max_steps: int
    z0: Float[Tensor, "batch n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method found; a sample above the tolerance before the step limit has stalled.

    Attributes:
        value: z.
        residual: relative residual of z per sample, in the problem's dtype or in float64.
        steps: iterations per sample.
        checks: how often the residual was evaluated.
        loop: where the iterations ran: in PyTorch, compiled on a CPU, or in Triton on the device.
        resting: of which samples rounding is what is left above the tolerance; `solve` finds out.
        worst: the largest residual, where it came with the rest; not finite if one is not.
        fallback: why PyTorch ran the iterations in the place of a kernel that failed.
    """

    value: Float[Tensor, "batch n"]
    residual: Float[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    checks: int
    loop: Loop = "torch"
    resting: Bool[Tensor, " batch"] | None = None
    worst: float | None = None
    fallback: str | None = None

    def status(self, request: Request) -> Status:
        """Say how the solve ended, the worst sample speaking for all."""
        if self.residual.numel() == 0:
            return Status.CONVERGED
        # The maximum propagates NaN.
        worst = float(self.residual.max()) if self.worst is None else self.worst
        if worst <= request.tol:
            return Status.CONVERGED
        if not math.isfinite(worst):
            return Status.DIVERGED
        if bool(self.unfinished(request).any()):
            return Status.STALLED
        above = ~(self.residual <= request.tol)
        if self.resting is not None and not bool((above & ~self.resting).any()):
            return Status.ROUNDING
        return Status.MAX_STEPS

    def unfinished(self, request: Request) -> Tensor:
        """Return which samples are above the tolerance, finite, and below the step limit."""
        above = (self.residual > request.tol) & torch.isfinite(self.residual)
        above &= self.steps < request.max_steps
        return above if self.resting is None else above & ~self.resting

    def select(self, index: Tensor) -> Outcome:
        """Return what was found for the samples of `index`."""
        return dataclasses.replace(
            self, value=self.value[index], residual=self.residual[index], steps=self.steps[index],
            resting=None if self.resting is None else self.resting[index], worst=None,
        )  # fmt: skip

    def replaced(self, index: Tensor, other: Outcome) -> Outcome:
        """Return this outcome with `other` at the samples of `index`."""
        value, residual, steps = self.value.clone(), self.residual.clone(), self.steps.clone()
        value[index], residual[index] = other.value, other.residual.to(residual.dtype)
        steps[index] = other.steps
        resting = self.resting
        if other.resting is not None:
            resting = (
                torch.zeros_like(steps, dtype=torch.bool) if resting is None else resting.clone()
            )
            resting[index] = other.resting
        return dataclasses.replace(
            self, value=value, residual=residual, steps=steps, resting=resting,
            checks=self.checks + other.checks, worst=None,
        )  # fmt: skip

    def better_than(self, other: Outcome) -> Outcome:
        """Return this outcome, with the other value of the same samples where that is nearer."""
        nearer = (self.residual <= other.residual) | ~other.residual.isfinite()
        kept = dataclasses.replace(
            self,
            value=torch.where(nearer[:, None], self.value, other.value),
            residual=torch.where(nearer, self.residual, other.residual.to(self.residual.dtype)),
            worst=None,
        )
        if self.resting is None or other.resting is None:
            return kept
        return dataclasses.replace(kept, resting=torch.where(nearer, self.resting, other.resting))

    def continued(self, index: Tensor, other: Outcome) -> Outcome:
        """Return this outcome with `other`, which began where this one ended, at `index`."""
        return self.replaced(
            index, dataclasses.replace(other, steps=self.steps[index] + other.steps)
        )


def check_method(method: object, name: str = "method") -> None:
    """Check that this is a `Method`.

    Raises:
        TypeError: if not.
    """
    if isinstance(method, Method):
        return
    take = "one of solvers, such as PeacemanRachford()"
    if isinstance(method, type):
        take = f"an instance, {method.__name__}()"
    raise TypeError(f"{name} must be a solvers.Method, got {method!r}: pass {take}")


class Method(ABC):
    """Finds z = σ(Wz + v); a frozen dataclass, whose `repr` is the Python that makes it."""

    def __repr__(self) -> str:
        """Return the call that makes an equal method, defaults left out."""
        given = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({', '.join(given)})"

    def chosen(self, problem: Inclusion) -> Method:
        """Return the method that will run on this problem; itself unless it chooses among many."""
        return self

    def fallbacks(self, problem: Inclusion, request: Request) -> tuple[Method, ...]:
        """Return what to try, one after the other, on samples that the method chosen missed."""
        return ()

    @abstractmethod
    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Solve a problem of samples × n without a graph; never raises for missing a tolerance."""

    def likely_causes(self, problem: Inclusion) -> str:
        """Say why this method may have failed on this problem, with numbers."""
        constants = problem.operator.constants()
        if constants.m <= 0:
            return (
                f"Causes: the weights are not monotone in the Λ norm (m = {constants.m:.2g}); run "
                "the layer's certificate()."
            )
        return (
            f"Causes: {self.step_cause(problem, constants.m, constants.L)}the problem is hard "
            f"(m = {constants.m:.2g}, L = {constants.L:.2g}), so it needs more steps; or the "
            f"tolerance is below the rounding of {problem.bias.dtype}. "
            "Try more max_steps or float64."
        )

    def step_cause(self, problem: Inclusion, m: float, L: float) -> str:
        """Return what the step size may have to do with a failure, or nothing."""
        return ""
