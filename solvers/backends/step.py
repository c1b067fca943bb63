"""What passes between `solve` and whatever runs a method?

A `Request` goes in and an `Outcome` comes back, wherever the loop runs: in PyTorch, compiled on a
CPU, or in Triton on a CUDA device. A loop that runs as a whole in C++ or Triton is given the
splitting as an `Iteration`.
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
"""A residual that no longer falls is at rest once it is below this many roundoffs (eps)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """State what a method is asked for.

    Args:
        tol: relative tolerance in the Λ norm, for every sample.
        max_steps: limit of iterations.
        z0: warm start, batch × n; a cold start when omitted.

    Example:
        >>> Request(tol=1e-4, max_steps=100)
        Request(tol=0.0001, max_steps=100, z0=None)
    """

    tol: float
    max_steps: int
    z0: Float[Tensor, "batch n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Hold what a method found, sample by sample.

    A sample has stalled if it is above the tolerance although the step limit was not reached.

    Args:
        value: z, batch × n.
        residual: relative residual of z per sample in the Λ norm, in the problem's dtype or in
            float64.
        steps: iterations per sample.
        checks: how often the residual was evaluated.
        loop: where the iterations ran: in PyTorch, compiled on a CPU, or in Triton on the device.
        rounding_limited: whether rounding alone keeps a sample above the tolerance; `solve`
            decides it, so methods leave it None.
        worst: the largest residual, if the loop has returned it to the host already; not finite
            if the residual of some sample is not.
        fallback: why PyTorch ran the iterations in place of a kernel that failed.

    Example:
        >>> z, r = torch.zeros(2, 3), torch.tensor([1e-5, 0.2])
        >>> found = Outcome(value=z, residual=r, steps=torch.tensor([4, 9]), checks=2)
        >>> found.status(Request(tol=1e-4, max_steps=100))
        <Status.STALLED: 'stalled above its tolerance'>
        >>> found.find_unfinished(Request(tol=1e-4, max_steps=100))
        tensor([False,  True])
    """

    value: Float[Tensor, "batch n"]
    residual: Float[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    checks: int
    loop: Loop = "torch"
    rounding_limited: Bool[Tensor, " batch"] | None = None
    worst: float | None = None
    fallback: str | None = None

    def status(self, request: Request) -> Status:
        """Return how the solve ended; the worst sample decides."""
        if self.residual.numel() == 0:
            return Status.CONVERGED
        # The maximum propagates NaN.
        worst = float(self.residual.max()) if self.worst is None else self.worst
        if worst <= request.tol:
            return Status.CONVERGED
        if not math.isfinite(worst):
            return Status.DIVERGED
        if bool(self.find_unfinished(request).any()):
            return Status.STALLED
        above, limited = ~(self.residual <= request.tol), self.rounding_limited
        if limited is not None and not bool((above & ~limited).any()):
            return Status.ROUNDING
        return Status.MAX_STEPS

    def find_unfinished(self, request: Request) -> Bool[Tensor, " batch"]:
        """Return which samples could still go on.

        Their residual is finite and above the tolerance, they have steps left, and rounding is not
        known to be all that keeps them from the tolerance.
        """
        above = (self.residual > request.tol) & torch.isfinite(self.residual)
        above &= self.steps < request.max_steps
        return above if self.rounding_limited is None else above & ~self.rounding_limited

    def select(self, index: Int[Tensor, " part"]) -> Outcome:
        """Return the outcome of the samples of `index`."""
        limited = self.rounding_limited
        return dataclasses.replace(
            self, value=self.value[index], residual=self.residual[index], steps=self.steps[index],
            rounding_limited=None if limited is None else limited[index], worst=None,
        )  # fmt: skip

    def replace_samples(self, index: Int[Tensor, " part"], other: Outcome) -> Outcome:
        """Return this outcome with that of `other` at the samples of `index`."""
        value, residual, steps = self.value.clone(), self.residual.clone(), self.steps.clone()
        value[index], residual[index] = other.value, other.residual.to(residual.dtype)
        steps[index] = other.steps
        limited = self.rounding_limited
        if other.rounding_limited is not None:
            limited = (
                torch.zeros_like(steps, dtype=torch.bool) if limited is None else limited.clone()
            )
            limited[index] = other.rounding_limited
        return dataclasses.replace(
            self, value=value, residual=residual, steps=steps, rounding_limited=limited,
            checks=self.checks + other.checks, worst=None,
        )  # fmt: skip

    def take_better(self, other: Outcome) -> Outcome:
        """Return this outcome with the z of `other` wherever the residual of that is smaller."""
        nearer = (self.residual <= other.residual) | ~other.residual.isfinite()
        merged = dataclasses.replace(
            self,
            value=torch.where(nearer[:, None], self.value, other.value),
            residual=torch.where(nearer, self.residual, other.residual.to(self.residual.dtype)),
            worst=None,
        )
        own, others = self.rounding_limited, other.rounding_limited
        if own is None or others is None:
            return merged
        return dataclasses.replace(merged, rounding_limited=torch.where(nearer, own, others))

    def continue_samples(self, index: Int[Tensor, " part"], other: Outcome) -> Outcome:
        """Return this outcome continued by `other` at the samples of `index`.

        `other` began where this one ended, so the steps of both add up.
        """
        return self.replace_samples(
            index, dataclasses.replace(other, steps=self.steps[index] + other.steps)
        )


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """Describe one splitting to a fused loop: x ← (1 − θ)x + θ(s + ρ(x)M), z = prox(x).

    Args:
        map: M; the operator's memo caches it.
        alpha: α, one number or one per unit.
        reflected: whether ρ is the reflected prox and s = αv(I + M). Else ρ = prox and s = αv.
        relaxation: θ in (0, 1].
    """

    map: Map
    alpha: Step
    reflected: bool
    relaxation: float = 1.0

    @property
    def initial_steps(self) -> int:
        """Steps done before the loop begins: the first one of forward–backward, else none."""
        return 0 if self.reflected else 1


def slope_coefficients(
    activation: ProximalActivation,
) -> tuple[Float[Tensor, "batch n"] | None, float]:
    """Return the slopes of a piecewise linear σ as kernels take them.

    Returns:
        d of σ(v) = dv and 0 for a `LinearSlope`; else None and a of σ(v) = max(v, av).
    """
    match activation:
        case LinearSlope(d=d):
            return materialize(d), 0.0
        case LeakyReLU(negative_slope=a):
            return None, a
        case _:
            return None, 0.0


def materialize(tensor: Tensor) -> Tensor:
    """Return the same numbers contiguous in memory, with no negation pending."""
    return tensor.resolve_neg().contiguous()
