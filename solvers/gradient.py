"""Which gradient does an equilibrium pass on: the exact one, or one that costs less?

With z = σ(Wz + v), D = diag σ'(Wz + v) and a cotangent g of z, the exact gradient needs

    u = D(Wᵀu + g),      ∂ℓ/∂v = u,      ∂ℓ/∂W = u zᵀ.

The others stop on the way to u. They are biased, they are not the gradient of anything, and so
they have no derivative of their own. On the trained layers of benchmarks.mnist, where the plain
iteration diverges, only the truncated splitting comes near the exact gradient (benchmarks.solvers
prints the errors).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import LinearSlope
from solvers.inclusion import Inclusion
from solvers.methods import Method, PeacemanRachford, Request, check_method
from solvers.solution import check_options

Solve = Callable[[Inclusion, Method | None, float | None], Tensor]
"""Solves an adjoint problem differentiably by a method to a tolerance, None for the forward's."""


class Gradient(ABC):
    """How the cotangent of z becomes that of v; a frozen dataclass, whose `repr` is Python."""

    @abstractmethod
    def adjoint(self, problem: Inclusion, solve: Solve) -> Float[Tensor, "*batch n"]:
        """Return u, exact or not, for the problem u = D(Wᵀu + g) given as an inclusion."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether u solves its equation, so that it may be differentiated again."""


def check_gradient(gradient: object) -> None:
    """Check that this is a `Gradient`.

    Raises:
        TypeError: if not.
    """
    if isinstance(gradient, Gradient):
        return
    take = "ImplicitGradient()"
    if isinstance(gradient, type):
        take = f"an instance, {gradient.__name__}()"
    raise TypeError(f"gradient must be a solvers.Gradient, got {gradient!r}: pass {take}")


@dataclass(frozen=True, kw_only=True)
class ImplicitGradient(Gradient):
    """The exact gradient, right at any order: u solves its equation. Winston and Kolter (2020),
    Theorem 2.

    Args:
        method: how the adjoint is solved; like the forward problem when omitted, where `Auto`
            takes the forward solve's steps into account.
        tol: relative tolerance of the adjoint in the Λ⁻¹ norm; the forward one's when omitted.
    """

    method: Method | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            check_method(self.method)
        if self.tol is not None:
            check_options(self.tol, 1, "warn")

    def adjoint(self, problem: Inclusion, solve: Solve) -> Tensor:
        return solve(problem, self.method, self.tol)

    @property
    def exact(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class TruncatedGradient(Gradient):
    """u after `steps` iterations of a method on its equation, from a cold start.

    With a splitting the bias falls by its factor at every step, whatever the weights, as long as
    I − W is monotone. Truncation as of Shaban, Cheng, Hatch and Boots (2019), with the splitting of
    the adjoint in place of the unrolled one.

    Args:
        steps: number of iterations.
        method: whose iterations.

    Raises:
        ValueError: if steps is below 1.
    """

    steps: int = 5
    method: Method = PeacemanRachford()

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def adjoint(self, problem: Inclusion, solve: Solve) -> Tensor:
        flat = problem.detach().flatten()
        tol = 4 * torch.finfo(flat.bias.dtype).eps
        u = self.method.run(flat, Request(tol=tol, max_steps=self.steps)).value
        return u.reshape(problem.bias.shape)

    @property
    def exact(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Gradient):
    """The gradient of `steps` damped iterations z ← (1 − λ)z + λσ(Wz + v) from the solution.

    u = λD Σⱼ ((1 − λ)I + λWᵀD)ʲ g over j < steps: the truncated Neumann series, which approaches
    the exact u only where that iteration converges (‖(1 − λ)I + λDW‖ < 1 after scaling; trained
    monotone layers often violate it at λ = 1). Geng, Zhang, Bai, Wang and Lin (2021), equation 8.

    Args:
        steps: number of terms.
        damping: λ in (0, 1].

    Raises:
        ValueError: if steps is below 1 or damping outside (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")

    def adjoint(self, problem: Inclusion, solve: Solve) -> Tensor:
        assert isinstance(problem.activation, LinearSlope)
        D, transpose = problem.activation.d, problem.operator
        term = total = problem.bias
        for _ in range(self.steps - 1):
            term = term.lerp(transpose.mv(D * term), self.damping)
            total = total + term
        return self.damping * D * total

    @property
    def exact(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class JacobianFreeGradient(Gradient):
    """u = Dg: the gradient of one undamped iteration, at no cost. Fung, Heaton, Li, McKenzie,
    Osher and Yin (2022)."""

    def adjoint(self, problem: Inclusion, solve: Solve) -> Tensor:
        return problem.activation(problem.bias)

    @property
    def exact(self) -> bool:
        return False


def attach_gradient(gradient: Tensor, refusal: str, *inputs: Tensor) -> Tensor:
    """Return a gradient as a function of its inputs that refuses to be differentiated.

    Without that its derivative would be 0 in silence.
    """
    return _Final.apply(gradient, refusal, *inputs)  # type: ignore[no-untyped-call]


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, refusal: str, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.refusal = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(ctx.refusal)
