"""What does a solve return, and what does it say when it fails?"""

from __future__ import annotations

import enum
import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from solvers.dependencies import Sendable

OnFailure = Literal["warn", "raise"]
Loop = Literal["torch", "compiled", "device"]


class Status(enum.Enum):
    """Name how a solve ended; the values are the words that users read.

    Example:
        >>> Status.CONVERGED.value
        'reached its tolerance'
    """

    CONVERGED = "reached its tolerance"
    MAX_STEPS = "stopped at its step limit"
    STALLED = "stalled above its tolerance"
    ROUNDING = "stopped where rounding is what is left"
    DIVERGED = "diverged to a value that is not finite"


def check_options(tol: object, max_steps: object, on_failure: object) -> tuple[float, int]:
    """Check the options that every solve has, and return tol and max_steps as Python's numbers.

    Args:
        tol: any real number type, such as a NumPy scalar.
        max_steps: any integer type.
        on_failure: "warn" or "raise".

    Returns:
        tol as a float and max_steps as an int.

    Raises:
        TypeError: if tol is no real number or max_steps no integer.
        ValueError: if tol is not positive and finite, max_steps < 1, or on_failure unknown.
    """
    if type(tol) is not float and (isinstance(tol, bool) or not isinstance(tol, numbers.Real)):
        raise TypeError(f"tol must be a number such as 1e-4, got {tol!r}")
    if not float(tol) > 0:
        raise ValueError(f"tol = {tol} is below what can be held: take a number such as 1e-4")
    if float(tol) == math.inf:
        raise ValueError("tol must be finite, got inf: pass a number such as 1e-4")
    if type(max_steps) is not int and (
        isinstance(max_steps, bool) or not isinstance(max_steps, numbers.Integral)
    ):
        raise TypeError(f"max_steps must be an integer such as 5000, got {max_steps!r}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if not isinstance(on_failure, str) or on_failure not in get_args(OnFailure):
        raise ValueError(f'on_failure must be "warn" or "raise", got {on_failure!r}')
    return float(tol), int(max_steps)


class SolveError(RuntimeError):
    """Tell that a solve missed its tolerance, where the caller asked for errors.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> problem = Inclusion(DenseOperator(torch.zeros(2, 2) - 9), torch.ones(1, 2), ReLU())
        >>> solve(problem, tol=1e-6, max_steps=1, on_failure="raise")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        solvers.solution.SolveError: solve by ... stopped at its step limit after 1 steps ...
    """


class SolveWarning(RuntimeWarning):
    """Tell that a solve missed its tolerance, where the caller asked for warnings (the default).

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> problem = Inclusion(DenseOperator(torch.zeros(2, 2) - 9), torch.ones(1, 2), ReLU())
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     solution = solve(problem, tol=1e-6, max_steps=1)
        >>> [warning.category.__name__ for warning in caught], solution.converged
        (['SolveWarning'], False)
    """


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Count what a solve cost.

    Attributes:
        steps: iterations of each sample until it passed a check.
        checks: how often the residual was evaluated; each costs one product with W.
        loop: where the iterations ran: in PyTorch, compiled on a CPU, or in Triton on the device.
        fallback: why PyTorch ran them, if a kernel for the device could not be compiled or run;
            else None.

    Example:
        >>> Stats(steps=torch.tensor([4, 11]), checks=2).max_steps
        11
    """

    steps: Int[Tensor, " *batch"]
    checks: int
    loop: Loop = "torch"
    fallback: str | None = None

    @property
    def max_steps(self) -> int:
        """Return the iterations of the slowest sample; 0 for an empty batch."""
        return int(self.steps.max()) if self.steps.numel() else 0


@dataclass(frozen=True, kw_only=True)
class Solution(Sendable):
    """Hold the equilibrium that a solve found, with the evidence for it.

    Attributes:
        value: z, the approximate equilibrium; differentiable if `equilibrium` returned it.
        status: how the solve ended; CONVERGED says that every sample reached `tol`.
        stats: iterations per sample and number of checks.
        residual: ‖z̃ − z‖_Λ / max(‖z̃‖_Λ, ‖z‖_Λ) per sample with z̃ = σ(Wz + v). It is evaluated on
            the problem itself and is never a difference of iterates; nothing is subtracted.
        tol: the tolerance asked for, in the same relative Λ norm.
        name: what messages call this solve.
        likely_causes: returns one sentence; called only if the solve failed.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solution = solve(Inclusion(DenseOperator(W), v, ReLU()), tol=1e-6)
        >>> solution.value
        tensor([[0.4000, 1.2000]])
        >>> solution.converged, bool(solution.residual <= 1e-6)
        (True, True)
        >>> bool(solution.error_bound < 1e-5)
        True
    """

    value: Float[Tensor, "*batch n"]
    status: Status
    stats: Stats
    residual: Float[Tensor, " *batch"]
    tol: float
    name: str
    likely_causes: Callable[[], str] = field(repr=False)
    _error_bound: Callable[[], Tensor] = field(repr=False)
    _methods: tuple[object, ...] = field(repr=False)

    @property
    def method(self) -> str:
        """Return the `repr` of the method that ran, or of all that ran one after the other."""
        return ", then ".join(map(repr, self._methods))

    @property
    def converged(self) -> bool:
        """Whether every sample reached the tolerance."""
        return self.status is Status.CONVERGED

    @cached_property
    def error_bound(self) -> Float[Tensor, " *batch"]:
        """Return an upper bound of ‖z − z*‖_Λ per sample, in float64.

        z* is the exact equilibrium for the weights as they are when this is first used. See
        `Inclusion.error_bound` for the statement and its proof.
        """
        return self._error_bound()

    def message(self) -> str:
        """Return the outcome in one line, with the likely causes if it is a failure."""
        worst = float(self.residual.max()) if self.residual.numel() else 0.0
        text = (
            f"{self.name} by {self.method} {self.status.value} after {self.stats.max_steps} steps "
            f"with relative residual {worst:.1e}"
        )
        if self.converged:
            return f"{text} ≤ tol {self.tol:.0e}."
        failed = int((~(self.residual <= self.tol)).sum())
        causes = self._rounding_cause(worst) if self.status is Status.ROUNDING else None
        return (
            f"{text} > tol {self.tol:.0e} ({failed} of {self.residual.numel()} samples). "
            f"{causes or self.likely_causes()}"
        )

    def _rounding_cause(self, worst: float) -> str:
        dtype = self.value.dtype
        better = "float64, or " if dtype == torch.float32 else ""
        return (
            f"Cause: no {dtype} state was found that comes nearer, and no more is left than the "
            f"rounding of that type explains. Use {better}a tol of {2 * worst:.0e} or more."
        )

    def raise_if_failed(self) -> Solution:
        """Return self if every sample reached its tolerance.

        Raises:
            SolveError: if a sample missed it.
        """
        if not self.converged:
            raise SolveError(self.message())
        return self

    def report(self, on_failure: OnFailure) -> Solution:
        """Return self; if a sample missed its tolerance, warn or raise first.

        Args:
            on_failure: "warn" or "raise".

        Raises:
            SolveError: if a sample missed its tolerance and on_failure is "raise".

        Warns:
            SolveWarning: if a sample missed its tolerance and on_failure is "warn".
        """
        if on_failure == "raise":
            return self.raise_if_failed()
        if not self.converged:
            warnings.warn(self.message(), SolveWarning, stacklevel=3)
        return self
