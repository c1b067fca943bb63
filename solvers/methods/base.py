"""What is a method, and what passes between it and `solve`?

`solve` checks the problem, hands it to a method as rows of samples without a graph, and reports
what came back. Everything that finds an equilibrium, a splitting, Newton's method or another
package's solver, is a `Method`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

from solvers.backends.step import Outcome, Request
from solvers.inclusion import Inclusion


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

    def choose(self, problem: Inclusion) -> Method:
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
