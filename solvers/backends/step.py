"""What is a loop that runs a method given, and what does it return?

A `Request` goes in and an `Outcome` comes back, wherever the loop runs. A loop that runs as a whole
in C++ or Triton knows a splitting as an `Iteration`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from solvers.activations import LeakyReLU, LinearSlope, ProximalActivation, Step
from solvers.operators import Map
from solvers.solution import Loop, Status

FIRST_CHECK = 4
"""Steps before the residual is evaluated for the first time."""
STALL = 4096
"""Roundoffs within which a residual that no longer falls is at rest."""


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

    def replace_samples(self, index: Tensor, other: Outcome) -> Outcome:
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

    def continue_samples(self, index: Tensor, other: Outcome) -> Outcome:
        """Return this outcome with `other`, which began where this one ended, at `index`."""
        return self.replace_samples(
            index, dataclasses.replace(other, steps=self.steps[index] + other.steps)
        )


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One splitting as a fused loop runs it: x ← (1 − θ)x + θ(s + ρ(x)M), z = prox(x).

    Attributes:
        map: M, kept by the operator's memo.
        alpha: step sizes.
        reflected: whether ρ is the reflected prox and s = αv(I + M); else ρ = prox and s = αv.
        relaxation: θ.
    """

    map: Map
    alpha: Step
    reflected: bool
    relaxation: float = 1.0

    @property
    def done(self) -> int:
        """Steps that the loop has done when it enters: forward–backward's first."""
        return 0 if self.reflected else 1


def coefficients(activation: ProximalActivation) -> tuple[Tensor | None, float]:
    """Return d of σ(v) = dv per sample, or a of σ(v) = max(v, av)."""
    match activation:
        case LinearSlope(d=d):
            return plain(d), 0.0
        case LeakyReLU(negative_slope=a):
            return None, a
        case _:
            return None, 0.0


def plain(tensor: Tensor) -> Tensor:
    """Return the numbers in order in memory, with no negation pending."""
    return tensor.resolve_neg().contiguous()
