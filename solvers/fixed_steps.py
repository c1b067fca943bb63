"""What does a solve look like that never asks the device how far it is?

`solve` stops when it may, and to know that it waits for the device. Here the number of iterations
is given beforehand and nothing is looked at: the work can be queued at once, or captured as a CUDA
graph (`solvers.cuda_graphs`). What the iterations reached is returned as a tensor, for the caller
to judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers import backends
from solvers.activations import LinearSlope, Masked, ProximalActivation, Step
from solvers.backends import Iteration
from solvers.gradient import attach_gradient
from solvers.inclusion import Inclusion
from solvers.operators import DenseOperator
from solvers.operators.matrix import DenseResolvent
from solvers.precision import full_precision


def fixed_step_equilibrium(
    W: Float[Tensor, "n n"],
    v: Float[Tensor, "*batch n"],
    activation: ProximalActivation,
    *,
    step_size: Step,
    steps: int,
    backward_steps: int | None = None,
    metric: Float[Tensor, " n"] | None = None,
    adjoint_residual: Float[Tensor, " *batch"] | None = None,
    inverse: Float[Tensor, "n n"] | None = None,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, " *batch"]]:
    """Iterate towards z = σ(Wz + v) a given number of times, differentiably in W and v, once.

    Peaceman–Rachford splitting, as by `PeacemanRachford`; the resolvent is factored at every call,
    so weights may change at will, and its factor serves the backward pass, which is that of
    `equilibrium`. The host never waits for the device, so the numbers in tensors are not checked:
    a bad one shows in the residual.

    Where a factorization cannot be captured in a graph, the inverse is given: by
    `resolvent_inverse` from outside of the graph, or by `refine_inverse`, which has products
    alone, from that of nearby weights. The residuals are evaluated with W, so they tell of an
    inverse that is none.

    Args:
        W: the weights, float32 or float64.
        v: one row per sample; any leading batch dimensions.
        activation: σ.
        step_size: α > 0, one number or a tensor of one per unit, of the type and on the device of
            W; a constant to the gradient. `JacobiDeterminant()(DenseOperator(W))` is a good one,
            also for weights near W.
        steps: iterations forward.
        backward_steps: iterations of the adjoint; as many as forward when omitted.
        metric: Λ of the norm of the residuals; ones when omitted.
        adjoint_residual: where the backward pass writes the relative residual of the adjoint per
            sample, in the Λ⁻¹ norm; nobody learns of it when omitted.
        inverse: of I + α(I − W), a constant to the gradient; computed when omitted.

    Returns:
        z and, without a gradient, its `Inclusion.relative_residual` per sample.

    Raises:
        ValueError: if a number of steps is below 1, W is not square, shapes, dtypes or devices
            disagree, a step size is a number that is not positive and finite, or slopes of σ
            require a gradient.
    """
    backward_steps = steps if backward_steps is None else backward_steps
    if steps < 1 or backward_steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps} and backwards {backward_steps}")
    if v.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"problems are float32 or float64, got {v.dtype}")
    problem = Inclusion(DenseOperator(W, metric), v, activation)  # type: ignore[arg-type]
    problem.check()
    if isinstance(activation, LinearSlope) and activation.d.requires_grad:
        raise ValueError("slopes get no gradient here: detach them, or use equilibrium()")
    if adjoint_residual is not None and adjoint_residual.shape != v.shape[:-1]:
        raise ValueError(
            f"adjoint_residual must have one number per sample, shape {tuple(v.shape[:-1])}, "
            f"got {tuple(adjoint_residual.shape)}"
        )
    budget = _Settings(
        activation=activation,
        step=_checked_step(step_size, W),
        steps=steps,
        backward_steps=backward_steps,
        metric=problem.metric.detach(),
        adjoint_residual=adjoint_residual,
        inverse=None if inverse is None else _checked_inverse(inverse, W),
    )
    z, residual = _FixedSteps.apply(W, v, budget)  # type: ignore[no-untyped-call]
    return z, residual


def resolvent_inverse(W: Float[Tensor, "n n"], *, step_size: Step) -> Float[Tensor, "n n"]:
    """Return (I + α(I − W))⁻¹, without a gradient and without a look at the numbers.

    Args:
        W: the weights.
        step_size: α > 0, as for `fixed_step_equilibrium`.

    Returns:
        The inverse by LU factorization; not finite, or wrong, where there is none.

    Raises:
        ValueError: if W is not square, or the step size is no positive number or does not fit.

    Example:
        >>> resolvent_inverse(torch.zeros(2, 2), step_size=1.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    operator, step = DenseOperator(W.detach()), _checked_step(step_size, W)
    with torch.no_grad(), full_precision(W):
        return operator.unchecked_resolvent(step)[0].inverse


def refine_inverse(
    W: Float[Tensor, "n n"],
    inverse: Float[Tensor, "n n"],
    *,
    step_size: Step,
    steps: int,
) -> tuple[Float[Tensor, "n n"], Float[Tensor, ""]]:
    """Improve an approximate inverse X of A = I + α(I − W) by X ← X(2I − AX), products alone.

    The error I − AX is squared by every step, so X must have ‖I − AX‖ < 1: that of the weights
    before a step of an optimizer, not any. Newton's iteration of Schulz (1933); Higham (2008),
    Functions of Matrices, section 7.3, eq. (7.17).

    Args:
        W: the weights.
        inverse: X, of nearby weights or of a nearby step size.
        step_size: α > 0, as for `fixed_step_equilibrium`.
        steps: how often.

    Returns:
        The last X, and ‖I − AX‖ of it in Frobenius' norm: 1 or more, or NaN, where it did not
        converge, and roundoff times the condition number of A where nothing is left to improve.
        Neither has a gradient.

    Raises:
        ValueError: if the number of steps is below 1, W is not square, the inverse has another
            shape, dtype or device than W, or the step size is no positive number or does not fit.

    Example:
        >>> W, near = torch.zeros(2, 2), 0.4 * torch.eye(2)
        >>> X, error = refine_inverse(W, near, step_size=1.0, steps=4)
        >>> X
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    operator, step = DenseOperator(W.detach()), _checked_step(step_size, W)
    X = _checked_inverse(inverse, W)
    with torch.no_grad(), full_precision(W):
        A = operator.shifted(step)
        for _ in range(steps):
            X = torch.addmm(X, X, A @ X, beta=2, alpha=-1)
        error = A @ X
        error.diagonal().sub_(1)
        return X, torch.linalg.matrix_norm(error)


def _checked_inverse(inverse: Tensor, W: Tensor) -> Tensor:
    if inverse.shape != W.shape or inverse.dtype != W.dtype or inverse.device != W.device:
        raise ValueError(
            f"inverse must be shaped as W, {tuple(W.shape)}, of {W.dtype} on {W.device}, got "
            f"{tuple(inverse.shape)} of {inverse.dtype} on {inverse.device}"
        )
    return inverse.detach()


def _checked_step(step: Step, W: Tensor) -> Step:
    if not isinstance(step, Tensor):
        if not (math.isfinite(step) and step > 0):
            raise ValueError(f"step_size must be positive and finite, got {step}")
        return float(step)
    if step.shape not in ((), W.shape[:1]) or step.dtype != W.dtype or step.device != W.device:
        raise ValueError(
            f"step_size must be one number or one per unit, shape ({W.shape[0]},), of {W.dtype} on "
            f"{W.device}, got {tuple(step.shape)} of {step.dtype} on {step.device}"
        )
    return step.detach()


@dataclass(frozen=True, kw_only=True)
class _Settings:
    activation: ProximalActivation
    step: Step
    steps: int
    backward_steps: int
    metric: Tensor
    adjoint_residual: Tensor | None
    inverse: Tensor | None


class _FixedSteps(torch.autograd.Function):
    """z, its residual, and the implicit gradient of z from the factor that found it."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, v: Tensor, budget: _Settings) -> tuple[Tensor, Tensor]:
        with full_precision(v):
            operator = DenseOperator(W, budget.metric)
            if budget.inverse is None:
                factor, _ = operator.unchecked_resolvent(budget.step)
            else:
                factor = DenseResolvent(budget.inverse, budget.step)
            problem = Inclusion(operator, v, budget.activation).flatten()
            z, residual = _iterate(problem, factor, budget.steps)
        z, residual = z.reshape(v.shape), residual.reshape(v.shape[:-1])
        ctx.budget = budget
        ctx.save_for_backward(W, z, factor.inverse)
        ctx.mark_non_differentiable(residual)
        return z, residual

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        W, z, _inverse = ctx.saved_tensors
        with torch.no_grad(), full_precision(g):
            W_grad, v_grad = _FixedSteps._backward(ctx, g)
        if torch.is_grad_enabled():  # create_graph
            refusal = "fixed_step_equilibrium has no second derivative: use equilibrium()"
            v_grad = attach_gradient(v_grad, refusal, g, z, W)
            W_grad = None if W_grad is None else attach_gradient(W_grad, refusal, g, z, W)
        return W_grad, v_grad, None

    @staticmethod
    def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor]:
        (W, z, inverse), budget = ctx.saved_tensors, ctx.budget
        operator = DenseOperator(W, budget.metric)
        factor = DenseResolvent(inverse, budget.step).T
        with operator.settled():  # to compare its values would be to wait
            adjoint = Inclusion(operator.T, g, LinearSlope(budget.activation.slope(z))).flatten()
            u, residual = _iterate(adjoint, factor, budget.backward_steps)
        if budget.adjoint_residual is not None:
            budget.adjoint_residual.copy_(residual.reshape(g.shape[:-1]))
        W_grad = operator.pullback(u, z)[0] if ctx.needs_input_grad[0] else None
        return W_grad, u.reshape(g.shape)


def _iterate(problem: Inclusion, factor: DenseResolvent, steps: int) -> tuple[Tensor, Tensor]:
    """Return z after Peaceman–Rachford steps from a cold start, and its relative residual.

    The steps are those of `PeacemanRachford`; a kernel that makes them all may end at rest.
    """
    alpha, reflection = factor.step, factor.reflection()
    iteration = Iteration(map=reflection, alpha=alpha, reflected=True)
    found = backends.run_fixed_steps(problem, iteration, steps)
    if found is not None:
        return found
    activation = _without_looking(problem.activation)
    reflect = activation.reflector(alpha)
    x = problem.bias * alpha
    shift = reflection.add(x, x, None)
    spare = torch.empty_like(x)
    for _ in range(steps):
        u = reflect(x)
        x, spare = reflection.add(u, shift, spare), u
    z = activation.prox(x, alpha)
    return z, problem.relative_residual(z)


def _without_looking(activation: ProximalActivation) -> ProximalActivation:
    """Return σ with a prox that never waits for the device."""
    if isinstance(activation, Masked):
        return Masked(_without_looking(activation.activation), activation.mask)
    if type(activation).prox is not ProximalActivation.prox:
        return activation  # a formula of its own
    return _FixedNewton(activation)


# Note [Newton without looking]
# Measured for Tanh, Sigmoid and Softplus at arguments up to a few hundred: ten steps reach rounding
# for α in [0.1, 3], and 18 for α in [0.001, 1000]. What fewer leave undone is in the residual.
_NEWTON_STEPS = 10


@dataclass(frozen=True)
class _FixedNewton(ProximalActivation):
    """σ whose prox takes a fixed number of steps of the same bracketed Newton method."""

    activation: ProximalActivation

    def __call__(self, v: Tensor) -> Tensor:
        return self.activation(v)

    def slope(self, z: Tensor) -> Tensor:
        return self.activation.slope(z)

    def prox(self, x: Tensor, step: Step) -> Tensor:
        if not isinstance(step, Tensor) and step == 1:
            return self.activation(x)
        *_, (_, value) = islice(self.approximations(x, step), _NEWTON_STEPS + 1)
        return value
