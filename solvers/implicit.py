"""How does a gradient pass through an equilibrium without unrolling the solver?

With z = σ(Wz + v) and D = diag σ'(Wz + v), a cotangent g of z gives

    u = D(Wᵀu + g),      ∂ℓ/∂v = u,      ∂ℓ/∂W = u zᵀ,

and the equation for u is again a monotone inclusion (operator Wᵀ, bias g, "activation" u ↦ Du). So
the same `solve` with the same factor serves it, and because the adjoint is itself an equilibrium,
its derivative is too: gradients of any order. Winston and Kolter (2020), Theorem 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import LinearSlope, ProximalActivation
from solvers.auto import Auto
from solvers.gradient import Gradient, ImplicitGradient, check_gradient, final
from solvers.inclusion import Inclusion
from solvers.method import Method
from solvers.operators import LinearOperator
from solvers.solution import OnFailure, Solution
from solvers.solve import full_precision, solve


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How to solve, forward and backward; shared by every order of differentiation."""

    method: Method
    gradient: Gradient
    tol: float
    max_steps: int
    on_failure: OnFailure
    require_monotone: bool


def equilibrium(
    problem: Inclusion,
    method: Method | None = None,
    *,
    tol: float = 1e-4,
    max_steps: int = 5000,
    z0: Float[Tensor, "*batch n"] | None = None,
    gradient: Gradient | None = None,
    on_failure: OnFailure = "warn",
    require_monotone: bool = True,
    name: str = "forward solve",
) -> Solution:
    """Solve z = σ(Wz + v), differentiably in v and in the tensors that define W.

    The backward pass solves the adjoint inclusion to the same relative tolerance. Memory does not
    grow with the number of iterations: only v, z and W are kept.

    Args, returns and raises are those of `solve`; `Solution.value` carries the graph. The adjoint
    solve warns or raises like the forward one. `gradient` says what is passed back,
    `ImplicitGradient()` when omitted; a biased one raises NotImplementedError when it is to be
    differentiated again. Forward-mode derivatives raise RuntimeError.
    """
    if gradient is not None:
        check_gradient(gradient)
    options = _Options(
        method=Auto() if method is None else method,
        gradient=ImplicitGradient() if gradient is None else gradient,
        tol=tol,
        max_steps=max_steps,
        on_failure=on_failure,
        require_monotone=require_monotone,
    )
    return _equilibrium(problem, z0, options, name)


def _equilibrium(problem: Inclusion, z0: Tensor | None, options: _Options, name: str) -> Solution:
    solution = solve(
        problem,
        options.method,
        tol=options.tol,
        max_steps=options.max_steps,
        z0=z0,
        on_failure=options.on_failure,
        require_monotone=options.require_monotone,
        name=name,
    )
    activation = problem.activation
    slope = activation.d if isinstance(activation, LinearSlope) else None
    backward = _Backward(options=options, forward=solution)
    value = _Equilibrium.apply(  # type: ignore[no-untyped-call]
        solution.value, problem.bias, slope, problem.operator, activation, backward,
        *problem.operator.tensors,
    )  # fmt: skip
    return dataclasses.replace(solution, value=value)


@dataclass(frozen=True, kw_only=True)
class _Backward:
    options: _Options
    forward: Solution

    def adjoint(self, operator: LinearOperator, cotangent: Tensor, slope: Tensor) -> Tensor:
        problem = Inclusion(operator.T, cotangent, LinearSlope(slope))
        gradient = self.options.gradient
        u = gradient.adjoint(problem, self._solve)
        if gradient.exact:
            return u
        refusal = (
            f"{gradient!r} is not the gradient of a function and has no derivative: use "
            "ImplicitGradient() for second derivatives"
        )
        return final(u, refusal, cotangent, slope, *operator.tensors)

    def _solve(self, problem: Inclusion, method: Method | None, tol: float | None) -> Tensor:
        method = self.options.method if method is None else method
        if isinstance(method, Auto):
            steps = self.forward.stats.steps
            mean = float(steps.double().mean()) if steps.numel() else 0.0
            method = method.adjoint(mean, problem)
        options = dataclasses.replace(
            self.options, method=method, tol=self.options.tol if tol is None else tol
        )
        return _equilibrium(problem, None, options, "adjoint solve").value


class _Equilibrium(torch.autograd.Function):
    """Attaches the implicit gradient to a solved z.

    The operator travels as a plain object for its cached factors; its tensors travel as saved
    tensors, so that autograd sees them and notices when one is changed in place.
    """

    @staticmethod
    def forward(
        z: Tensor,
        bias: Tensor,
        slope: Tensor | None,
        operator: LinearOperator,
        activation: ProximalActivation,
        backward: _Backward,
        *tensors: Tensor,
    ) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, slope, operator, activation, backward, *tensors = inputs
        ctx.operator = operator.rebuild(tuple(t.detach() for t in tensors))
        ctx.activation = None if slope is not None else activation
        ctx.how = backward
        saved = () if slope is None else (bias, slope)
        ctx.save_for_backward(output, *saved, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(g, convolutions=ctx.operator.by_kernels):
            return _Equilibrium._backward(ctx, g)

    @staticmethod
    def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, *rest = ctx.saved_tensors
        if ctx.activation is None:
            bias, slope, *tensors = rest
        else:
            tensors, slope = rest, ctx.activation.slope(z)
        operator = ctx.operator.rebuild(tuple(tensors))
        u = ctx.how.adjoint(operator, g, slope)
        slope_grad = None
        if ctx.activation is None and ctx.needs_input_grad[2]:
            # z = d ⊙ (Wz + v): ∂ℓ/∂d = (Wᵀu + g) ⊙ (Wz + v)
            slope_grad = operator.T.affine(u, g) * operator.affine(z, bias)
        pullback: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if any(ctx.needs_input_grad[6:]):
            pullback = operator.pullback(u, z)
        return (None, u, slope_grad, None, None, None, *pullback)
