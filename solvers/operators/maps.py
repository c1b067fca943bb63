"""What does a splitting apply to its iterate?

A linear map once per step (`Map`), which comes from a factor of the resolvent (`Resolvent`) or from
W itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step


class NotMonotoneError(ValueError):
    """I − W is not strongly monotone in the Λ norm, so the equilibrium need not exist.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator, Inclusion, NotMonotoneError, ReLU, solve
        >>> problem = Inclusion(DenseOperator(2 * torch.eye(2)), torch.ones(1, 2), ReLU())
        >>> try:
        ...     solve(problem)
        ... except NotMonotoneError as error:
        ...     print(str(error)[:52])
        I − W is not strongly monotone in the Λ norm: m = -1
    """


class Map(ABC):
    """A linear map M that a splitting applies once per step.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator
        >>> relaxed = DenseOperator(torch.zeros(2, 2)).relax(0.25)  # (1 − ¼)I
        >>> relaxed.add(torch.ones(1, 2), torch.zeros(1, 2), None).tolist()
        [[0.75, 0.75]]
    """

    is_expensive: bool = False
    """Whether a product costs many elementwise passes over its argument."""

    @abstractmethod
    def add(
        self, x: Float[Tensor, "batch n"], shift: Float[Tensor, "batch n"], out: Tensor | None
    ) -> Float[Tensor, "batch n"]:
        """Return shift + Mx, written to `out` (which is neither x nor shift) when given."""


class Resolvent(ABC):
    """R = (I + diag(α)(I − W))⁻¹, factored once per weight change.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator
        >>> R = DenseOperator(torch.zeros(2, 2)).resolvent(1.0)  # ½I
        >>> R.solve(torch.ones(2)).tolist()
        [0.5, 0.5]
    """

    @abstractmethod
    def solve(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return R x."""

    @property
    @abstractmethod
    def T(self) -> Resolvent:
        """The resolvent of Wᵀ with the same step, from the same factor.

        (I + P(I − Wᵀ))⁻¹ = P (I + P(I − W))⁻ᵀ P⁻¹ with P = diag(α).
        """

    def reflection(self) -> Map:
        """Return 2R − I; by `solve`, unless a class has something faster."""
        return Reflection(self)


@dataclass(frozen=True, eq=False)
class Reflection(Map):
    """M = 2R − I by the resolvent's own `solve`."""

    resolvent: Resolvent

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        return torch.add(shift, self.resolvent.solve(x), alpha=2, out=out).sub_(x)


def step_key(step: Step) -> Hashable:
    """Return what names α in a memo: its value."""
    if isinstance(step, float | int):
        return step
    return step.shape, step.dtype, step.device, step.detach().cpu().numpy().tobytes()


def own_step(step: Step) -> Step:
    """Return an α that nobody else can change, for a resolvent in a memo."""
    return step.detach().clone() if isinstance(step, Tensor) else step


def column(step: Step) -> Step:
    """Return α to scale the rows of a matrix: one number, or a column of one per unit."""
    return step[:, None] if isinstance(step, Tensor) and step.ndim else step


def singular(step: Step) -> NotMonotoneError:
    """Return the error for a matrix I + α(I − W) without an inverse."""
    return NotMonotoneError(
        "I + α(I − W) is singular or not finite, so W is not monotone (or not finite) "
        f"at step size {step}: check the weights with their certificate"
    )
