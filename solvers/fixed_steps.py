"""How is an equilibrium computed without ever waiting for the device?

By a number of iterations that is given beforehand. `solve` waits for the device to learn when it
may stop. Here the host reads no number, so the work can be queued at once or captured as a CUDA
graph (`solvers.cuda_graphs`). The residual that the iterations reached is returned as a tensor.
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
from solvers.gradient import forbid_differentiation
from solvers.inclusion import Inclusion
from solvers.operators import DenseOperator
from solvers.operators.matrix import DenseResolvent
from solvers.precision import use_full_precision


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
    """Iterate towards z = σ(Wz + v) a given number of times; W and v get first derivatives.

    The iteration is that of `PeacemanRachford`, and the backward pass is that of `equilibrium`. The
    resolvent is factored at every call, so weights may change at will; its factor serves the
    backward pass too. The host never waits for the device, so the numbers in tensors are not
    checked. A bad number shows in the residual.

    If a factorization cannot be captured in a graph, pass `inverse`. `resolvent_inverse` computes
    it outside of the graph. `refine_inverse` computes it by products alone from that of nearby
    weights, also within the graph. Residuals are evaluated with W, so a wrong inverse shows there.

    Args:
        W: the weights, float32 or float64.
        v: one row per sample; any leading batch dimensions.
        activation: σ.
        step_size: α > 0, one number or a tensor of one per unit, of the dtype and on the device of
            W; it gets no gradient. `JacobiDeterminant()(DenseOperator(W))` is a good one, also for
            weights near W.
        steps: iterations of the forward pass.
        backward_steps: iterations of the adjoint; as many as forward when omitted.
        metric: Λ of the norm of the residuals; ones when omitted.
        adjoint_residual: memory into which the backward pass writes the relative residual of the
            adjoint per sample, in the Λ⁻¹ norm; not written when omitted.
        inverse: (I + α(I − W))⁻¹, which gets no gradient; computed when omitted.

    Returns:
        z, and per sample its relative residual in the Λ norm (`Inclusion.relative_residual`), which
        has no gradient.

    Raises:
        ValueError: if a number of steps is below 1, W is not square, shapes, dtypes or devices
            disagree, a step size is a number that is not positive and finite, or slopes of σ
            require a gradient.
        NotImplementedError: on a second derivative.

    Example:
        >>> from solvers import ReLU
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> z, residual = fixed_step_equilibrium(W, v, ReLU(), step_size=1.0, steps=30)
        >>> z
        tensor([[0.4000, 1.2000]])
        >>> bool(residual < 1e-6)
        True
    """
    backward_steps = steps if backward_steps is None else backward_steps
    if steps < 1 or backward_steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps} and backwards {backward_steps}")
    if v.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"problems are float32 or float64, got {v.dtype}")
    operator = DenseOperator(W) if metric is None else DenseOperator(W, metric)
    problem = Inclusion(operator, v, activation)
    problem.check()
    if isinstance(activation, LinearSlope) and activation.d.requires_grad:
        raise ValueError("slopes get no gradient here: detach them, or use equilibrium()")
    if adjoint_residual is not None and adjoint_residual.shape != v.shape[:-1]:
        raise ValueError(
            f"adjoint_residual must have one number per sample, shape {tuple(v.shape[:-1])}, "
            f"got {tuple(adjoint_residual.shape)}"
        )
    settings = _Settings(
        activation=activation,
        step=_check_step(step_size, W),
        steps=steps,
        backward_steps=backward_steps,
        metric=problem.metric.detach(),
        adjoint_residual=adjoint_residual,
        inverse=None if inverse is None else _check_inverse(inverse, W),
    )
    z, residual = _FixedSteps.apply(W, v, settings)  # type: ignore[no-untyped-call]
    return z, residual


def resolvent_inverse(W: Float[Tensor, "n n"], *, step_size: Step) -> Float[Tensor, "n n"]:
    """Return (I + α(I − W))⁻¹, without a gradient and without waiting for the device.

    Args:
        W: the weights.
        step_size: α > 0, as for `fixed_step_equilibrium`.

    Returns:
        The inverse by LU factorization, n × n; wrong or not finite if the matrix is singular.

    Raises:
        ValueError: if W is not square, or the step size is no positive number or does not fit.

    Example:
        >>> resolvent_inverse(torch.zeros(2, 2), step_size=1.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    operator, step = DenseOperator(W.detach()), _check_step(step_size, W)
    with torch.no_grad(), use_full_precision(W):
        return operator.unchecked_resolvent(step)[0].inverse


def refine_inverse(
    W: Float[Tensor, "n n"],
    inverse: Float[Tensor, "n n"],
    *,
    step_size: Step,
    steps: int,
) -> tuple[Float[Tensor, "n n"], Float[Tensor, ""]]:
    """Improve an approximate inverse X of A = I + α(I − W) by X ← X(2I − AX), products alone.

    Every step squares the error I − AX, so X must have ‖I − AX‖ < 1. The inverse for the weights
    before a step of an optimizer usually has.
    Reference: Schulz (1933); Higham (2008), Functions of Matrices, section 7.3, equation (7.17).

    Args:
        W: the weights.
        inverse: X, of nearby weights or of a nearby step size.
        step_size: α > 0, as for `fixed_step_equilibrium`.
        steps: how often.

    Returns:
        The last X, n × n, and its error ‖I − AX‖ in the Frobenius norm, both without a gradient.
        The error is at least 1 or NaN if the iteration did not converge. It does not fall below
        about roundoff times the condition number of A.

    Raises:
        ValueError: if the number of steps is below 1, W is not square, the inverse has another
            shape, dtype or device than W, or the step size is no positive number or does not fit.

    Example:
        >>> W, near = torch.zeros(2, 2), 0.4 * torch.eye(2)
        >>> X, error = refine_inverse(W, near, step_size=1.0, steps=4)
        >>> X
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
        >>> bool(error < 1e-6)
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    operator, step = DenseOperator(W.detach()), _check_step(step_size, W)
    X = _check_inverse(inverse, W)
    with torch.no_grad(), use_full_precision(W):
        A = operator.shifted(step)
        for _ in range(steps):
            X = torch.addmm(X, X, A @ X, beta=2, alpha=-1)
        error = A @ X
        error.diagonal().sub_(1)
        return X, torch.linalg.matrix_norm(error)


def _check_inverse(inverse: Tensor, W: Tensor) -> Tensor:
    if inverse.shape != W.shape or inverse.dtype != W.dtype or inverse.device != W.device:
        raise ValueError(
            f"inverse must be shaped as W, {tuple(W.shape)}, of {W.dtype} on {W.device}, got "
            f"{tuple(inverse.shape)} of {inverse.dtype} on {inverse.device}"
        )
    return inverse.detach()


def _check_step(step: Step, W: Tensor) -> Step:
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
    """Compute z and its residual; the factor of the forward pass serves the implicit gradient."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, v: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        with use_full_precision(v):
            operator = DenseOperator(W, settings.metric)
            if settings.inverse is None:
                factor, _ = operator.unchecked_resolvent(settings.step)
            else:
                factor = DenseResolvent(settings.inverse, settings.step)
            problem = Inclusion(operator, v, settings.activation).flatten()
            z, residual = _iterate(problem, factor, settings.steps)
        z, residual = z.reshape(v.shape), residual.reshape(v.shape[:-1])
        ctx.settings = settings
        ctx.save_for_backward(W, z, factor.inverse)
        ctx.mark_non_differentiable(residual)
        return z, residual

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        W, z, _inverse = ctx.saved_tensors
        with torch.no_grad(), use_full_precision(g):
            W_grad, v_grad = _FixedSteps._backward(ctx, g)
        if torch.is_grad_enabled():  # create_graph
            refusal = "fixed_step_equilibrium has no second derivative: use equilibrium()"
            v_grad = forbid_differentiation(v_grad, refusal, g, z, W)
            W_grad = None if W_grad is None else forbid_differentiation(W_grad, refusal, g, z, W)
        return W_grad, v_grad, None

    @staticmethod
    def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor]:
        (W, z, inverse), settings = ctx.saved_tensors, ctx.settings
        operator = DenseOperator(W, settings.metric)
        factor = DenseResolvent(inverse, settings.step).T
        with operator.settled():  # a comparison of its values would wait for the device
            adjoint = Inclusion(operator.T, g, LinearSlope(settings.activation.slope(z))).flatten()
            u, residual = _iterate(adjoint, factor, settings.backward_steps)
        if settings.adjoint_residual is not None:
            settings.adjoint_residual.copy_(residual.reshape(g.shape[:-1]))
        W_grad = operator.pullback(u, z)[0] if ctx.needs_input_grad[0] else None
        return W_grad, u.reshape(g.shape)


def _iterate(problem: Inclusion, factor: DenseResolvent, steps: int) -> tuple[Tensor, Tensor]:
    """Return z after Peaceman–Rachford steps from a cold start, and its relative residual.

    The steps are those of `PeacemanRachford`. A kernel that makes them all may stop earlier, if the
    iteration is at rest.
    """
    alpha, reflection = factor.step, factor.reflection()
    iteration = Iteration(map=reflection, alpha=alpha, reflected=True)
    found = backends.run_fixed_steps(problem, iteration, steps)
    if found is not None:
        return found
    activation = _avoid_synchronization(problem.activation)
    reflect = activation.reflector(alpha)
    x = problem.bias * alpha
    shift = reflection.add(x, x, None)
    spare = torch.empty_like(x)
    for _ in range(steps):
        u = reflect(x)
        x, spare = reflection.add(u, shift, spare), u
    z = activation.prox(x, alpha)
    return z, problem.relative_residual(z)


def _avoid_synchronization(activation: ProximalActivation) -> ProximalActivation:
    """Return σ with a prox that never waits for the device."""
    if isinstance(activation, Masked):
        return Masked(_avoid_synchronization(activation.activation), activation.mask)
    if type(activation).prox is not ProximalActivation.prox:
        return activation  # a formula of its own
    return _FixedNewton(activation)


# Note [Newton without synchronization]
# Measured for Tanh, Sigmoid and Softplus at arguments up to a few hundred: ten steps reach rounding
# for α in [0.1, 3], and 18 for α in [0.001, 1000]. The residual includes the error of fewer steps.
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
