"""Which gradient does an equilibrium pass on: the exact one, or one that costs less?

With z = σ(Wz + v), D = diag σ'(Wz + v) and a cotangent g of z, the exact gradient needs

    u = D(Wᵀu + g),      ∂ℓ/∂v = u,      ∂ℓ/∂W = u zᵀ.

The others stop on the way to u. They are biased, and they are not the gradient of any function, so
they have no derivative. On the trained layers of benchmarks.mnist, on which the iteration
u ← D(Wᵀu + g) diverges, only the truncated splitting comes near the exact gradient
(benchmarks.solvers prints the errors).
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
"""Solve an adjoint problem differentiably by a method to a tolerance (None: those of forward)."""


class Gradient(ABC):
    """Turn the cotangent g of z into the cotangent u of v.

    A subclass is a frozen dataclass; its `repr` is the Python that makes it.

    Example:
        >>> PhantomGradient(steps=3), PhantomGradient().is_exact, ImplicitGradient().is_exact
        (PhantomGradient(steps=3, damping=0.5), False, True)
    """

    @abstractmethod
    def adjoint(self, problem: Inclusion, solve: Solve) -> Float[Tensor, "*batch n"]:
        """Return u, exactly or approximately, of the equation u = D(Wᵀu + g).

        Args:
            problem: the equation as an inclusion: operator Wᵀ, bias g, activation u ↦ Du.
            solve: solves such a problem differentiably.
        """

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Return whether u solves its equation, so that it has a derivative."""


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
    """Return the exact gradient, of any order: u solves u = D(Wᵀu + g).

    Reference: Winston and Kolter (2020), Theorem 2.

    Args:
        method: how the adjoint is solved; if omitted, by the method of the forward solve, whose
            number of steps `Auto` takes into account.
        tol: relative tolerance of the adjoint in the Λ⁻¹ norm; the forward one's when omitted.

    Raises:
        TypeError, ValueError: if method is no `Method`, or tol is not positive and finite.

    Example:
        >>> from solvers import DenseOperator, ImplicitGradient, ReLU, equilibrium
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> v.requires_grad_()
        tensor([[1., 1.]], requires_grad=True)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> gradient = ImplicitGradient()
        >>> equilibrium(problem, tol=1e-6, gradient=gradient).value.sum().backward()
        >>> v.grad
        tensor([[1.2000, 0.4000]])
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
    def is_exact(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class TruncatedGradient(Gradient):
    """Return u after `steps` iterations of a method on u = D(Wᵀu + g), from a cold start.

    If the method is a splitting and I − W is strongly monotone, the error of u falls at every step
    by the factor of the splitting, whatever the weights are.
    Reference: Shaban, Cheng, Hatch and Boots (2019) for truncation; there the forward iteration is
    unrolled, here the adjoint is split.

    Args:
        steps: number of iterations, at least 1.
        method: whose iterations.

    Raises:
        TypeError: if method is no `Method`.
        ValueError: if steps is below 1.

    Example:
        >>> from solvers import DenseOperator, ReLU, TruncatedGradient, equilibrium
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> v.requires_grad_()
        tensor([[1., 1.]], requires_grad=True)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> gradient = TruncatedGradient(steps=20)
        >>> equilibrium(problem, tol=1e-6, gradient=gradient).value.sum().backward()
        >>> v.grad
        tensor([[1.2000, 0.4000]])
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
    def is_exact(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Gradient):
    """Return the gradient of `steps` damped iterations z ← (1 − λ)z + λσ(Wz + v) from the solution.

    It is the truncated Neumann series u = λD Σⱼ ((1 − λ)I + λWᵀD)ʲ g over 0 ≤ j < steps. It
    approaches the exact u only if the iteration converges, for instance if ‖(1 − λ)I + λDW‖ < 1 in
    some norm. At λ = 1 trained monotone layers often violate this.
    Reference: Geng, Zhang, Bai, Wang and Lin (2021), equation 8.

    Args:
        steps: number of terms, at least 1.
        damping: λ in (0, 1].

    Raises:
        ValueError: if steps is below 1 or damping outside (0, 1].

    Example:
        >>> from solvers import DenseOperator, PhantomGradient, ReLU, equilibrium
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> v.requires_grad_()
        tensor([[1., 1.]], requires_grad=True)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> gradient = PhantomGradient(steps=40)
        >>> equilibrium(problem, tol=1e-6, gradient=gradient).value.sum().backward()
        >>> v.grad
        tensor([[1.2000, 0.4000]])
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
    def is_exact(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class JacobianFreeGradient(Gradient):
    """Return u = Dg, the gradient of one iteration z ← σ(Wz + v) from the solution.

    It costs nothing beyond the slopes D.
    Reference: Fung, Heaton, Li, McKenzie, Osher and Yin (2022).

    Example:
        >>> from solvers import DenseOperator, JacobianFreeGradient, ReLU, equilibrium
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> v.requires_grad_()
        tensor([[1., 1.]], requires_grad=True)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> gradient = JacobianFreeGradient()
        >>> equilibrium(problem, tol=1e-6, gradient=gradient).value.sum().backward()
        >>> v.grad
        tensor([[1., 1.]])
    """

    def adjoint(self, problem: Inclusion, solve: Solve) -> Tensor:
        return problem.activation(problem.bias)

    @property
    def is_exact(self) -> bool:
        return False


def forbid_differentiation(gradient: Tensor, refusal: str, *inputs: Tensor) -> Tensor:
    """Return the gradient such that its derivative raises an error instead of being 0 in silence.

    Args:
        gradient: computed outside of autograd.
        refusal: the message of the error.
        *inputs: of which the gradient is a function.

    Returns:
        The same numbers, which depend on the inputs in autograd's graph. Their derivative raises
        NotImplementedError.
    """
    return _Undifferentiable.apply(gradient, refusal, *inputs)  # type: ignore[no-untyped-call]


class _Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, refusal: str, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.refusal = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(ctx.refusal)
