"""What does a solve return, and what does it say when it fails?"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from solvers.dependencies import Sendable

OnFailure = Literal["warn", "raise"]
Loop = Literal["torch", "compiled", "device"]


class Status(enum.Enum):
    """How a solve ended; the values are the words that users read."""

    CONVERGED = "reached its tolerance"
    MAX_STEPS = "stopped at its step limit"
    STALLED = "stalled above its tolerance"
    DIVERGED = "diverged to a value that is not finite"


class SolveError(RuntimeError):
    """A solve ended without reaching its tolerance, and the caller asked to be told by an error."""


class SolveWarning(RuntimeWarning):
    """A solve ended without reaching its tolerance, and the caller asked to be warned."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Cost of a solve.

    Attributes:
        steps: iterations taken until each sample passed its check.
        checks: how often the residual was evaluated; each costs one product with W.
        loop: where the iterations ran: in PyTorch, compiled on a CPU, or in Triton on the device.
    """

    steps: Int[Tensor, " *batch"]
    checks: int
    loop: Loop = "torch"

    @property
    def max_steps(self) -> int:
        """Iterations of the slowest sample (0 for an empty batch)."""
        return int(self.steps.max()) if self.steps.numel() else 0


@dataclass(frozen=True, kw_only=True)
class Solution(Sendable):
    """State returned by a solve, with the evidence for it.

    Attributes:
        value: z, the approximate equilibrium. Differentiable when it comes from `equilibrium`.
        status: how the solve ended; converged means that every sample reached `tol`.
        stats: iterations per sample and number of checks.
        residual: ‖z̃ − z‖_Λ / max(‖z̃‖_Λ, ‖z‖_Λ) per sample, with z̃ = σ(Wz + v), evaluated on
            the problem itself (never a difference of iterates).
        tol: the tolerance asked for, in the same relative Λ norm.
        name: what messages call this solve.
        likely_causes: one sentence, evaluated only when the solve failed.
    """

    value: Float[Tensor, "*batch n"]
    status: Status
    stats: Stats
    residual: Float[Tensor, " *batch"]
    tol: float
    name: str
    likely_causes: Callable[[], str] = field(repr=False)
    _error_bound: Callable[[], Tensor] = field(repr=False)
    _method: object = field(repr=False)

    @property
    def method(self) -> str:
        """`repr` of the method that ran."""
        return repr(self._method)

    @property
    def converged(self) -> bool:
        """Whether every sample reached the tolerance."""
        return self.status is Status.CONVERGED

    @cached_property
    def error_bound(self) -> Float[Tensor, " *batch"]:
        """Upper bound of ‖z − z*‖_Λ per sample, float64, for the weights as they are at first use.

        See `Inclusion.error_bound` for the statement and its proof.
        """
        return self._error_bound()

    def message(self) -> str:
        """Describe the outcome in one line, with the likely causes when it is a failure."""
        worst = float(self.residual.max()) if self.residual.numel() else 0.0
        text = (
            f"{self.name} by {self.method} {self.status.value} after {self.stats.max_steps} steps "
            f"with relative residual {worst:.1e}"
        )
        if self.converged:
            return f"{text} ≤ tol {self.tol:.0e}."
        failed = int((~(self.residual <= self.tol)).sum())
        return (
            f"{text} > tol {self.tol:.0e} ({failed} of {self.residual.numel()} samples). "
            f"{self.likely_causes()}"
        )

    def raise_if_failed(self) -> Solution:
        """Return self, or raise `SolveError` when a sample missed its tolerance."""
        if not self.converged:
            raise SolveError(self.message())
        return self

    def report(self, on_failure: OnFailure) -> Solution:
        """Return self after warning or raising, as asked, when a sample missed its tolerance."""
        if on_failure == "raise":
            return self.raise_if_failed()
        if not self.converged:
            warnings.warn(self.message(), SolveWarning, stacklevel=3)
        return self
