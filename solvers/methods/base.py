"""What is a method, and what passes between it and `solve`?

`solve` checks the problem, hands it to a method as rows of samples without a graph, and reports the
method's outcome. Everything that finds an equilibrium is a `Method`: a splitting, Newton's method,
or another package's solver.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

from solvers.backends.step import Outcome, Request
from solvers.inclusion import Inclusion


def check_method(method: object, name: str = "method") -> None:
    """Check that this is a `Method`.

    Args:
        method: anything.
        name: what the message calls it.

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
    """Find z = σ(Wz + v) for a batch of samples.

    A subclass is a frozen dataclass and implements `run`; its `repr` is the Python that makes it.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator, PeacemanRachford, ReLU
        >>> PeacemanRachford(step_size=0.5)
        PeacemanRachford(step_size=0.5)
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> PeacemanRachford().run(problem, Request(tol=1e-6, max_steps=100)).value
        tensor([[0.4000, 1.2000]])
    """

    def __repr__(self) -> str:
        """Return the call that makes an equal method, without its defaults."""
        given = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({', '.join(given)})"

    def choose(self, problem: Inclusion) -> Method:
        """Return the method that will run on this problem; only `Auto` returns another."""
        return self

    def fallbacks(self, problem: Inclusion, request: Request) -> tuple[Method, ...]:
        """Return the methods to try, one after the other, on samples that `choose`'s missed."""
        return ()

    @abstractmethod
    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Solve the problem of a batch.

        Args:
            problem: with a bias of shape batch × n, cut from the graph.
            request: tolerance in the Λ norm, step limit and start.

        Returns:
            The best z that was found, with its residual; missing the tolerance is no error.

        Raises:
            ValueError: if the method does not serve this kind of problem.
        """

    def likely_causes(self, problem: Inclusion) -> str:
        """Return a sentence on why this method may have failed on this problem, with numbers."""
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
        """Return how the step size may explain a failure, or an empty string."""
        return ""
