"""How does a gradient pass through an equilibrium without unrolling the solver?

With z = σ(Wz + v) and D = diag σ'(Wz + v), a cotangent g of z gives

    u = D(Wᵀu + g),      ∂ℓ/∂v = u,      ∂ℓ/∂W = u zᵀ,

and the equation for u is again a monotone inclusion (operator Wᵀ, bias g, "activation" u ↦ Du). So
the same `solve` with the same factor serves it, and because the adjoint is itself an equilibrium,
its derivative is too: gradients of any order. Winston and Kolter (2020), Theorem 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import LinearSlope
from solvers.dependencies import must_not_cache
from solvers.gradient import Gradient, ImplicitGradient, check_gradient
from solvers.inclusion import Inclusion
from solvers.methods import Auto, Method
from solvers.operators import LinearOperator
from solvers.precision import full_precision
from solvers.solution import OnFailure, Solution
from solvers.solve import solve


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

    The transforms of torch.func that go backwards (grad, vjp, jacrev) and vmap, over samples and
    over weights, may be taken of it; so may batched cotangents. Within a transform
    `Solution.error_bound` raises RuntimeError.
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
    with problem.operator.settled():
        call, tensors = _Call.of(problem, options, name)
        value, residual, steps = _Equilibrium.apply(  # type: ignore[no-untyped-call]
            call, z0, *tensors
        )
    found = next((s for s in call.found if not s.converged), call.found[-1])
    if not call.others:
        return dataclasses.replace(found, value=value)
    return dataclasses.replace(
        found, value=value, residual=residual, _error_bound=_no_error_bound,
        stats=dataclasses.replace(found.stats, steps=steps),
    )  # fmt: skip


def _no_error_bound() -> Tensor:
    raise RuntimeError(
        "error_bound is evaluated for plain tensors, not for those of a function transform or a "
        "trace: call equilibrium() or solve() outside of it"
    )


# Note [One function, from problem to state]
# Method, checks and loops look at numbers, which tensors of a function transform do not show. So
# the whole solve is one autograd function: torch.func hands it plain tensors, level by level. For
# that every tensor of the problem is an argument within a transform, also Λ and masks
# (`_Call.others`). Mapped samples are solved as one batch, mapped weights one after the other.
# Everywhere else the operator travels as an object, with its cached factors.
@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """A problem without its tensors, and how to solve it.

    Attributes:
        problem: with the tensors that it had when it was given.
        others: those of its tensors that have no gradient; none outside of a transform.
        is_plain: whether it was given outside of transforms, traces and captures.
        found: what solves of it returned.
    """

    problem: Inclusion
    options: _Options
    name: str
    others: tuple[Tensor, ...] = ()
    is_plain: bool = False
    found: list[Solution] = field(default_factory=list)

    @classmethod
    def of(
        cls, problem: Inclusion, options: _Options, name: str
    ) -> tuple[_Call, tuple[Tensor | None, ...]]:
        """Return the call and its tensors: v, slopes of a `LinearSlope`, those of W, others."""
        activation = problem.activation
        slope = activation.d if isinstance(activation, LinearSlope) else None
        main = (problem.bias, slope, *problem.operator.tensors)
        if not must_not_cache():
            return cls(problem=problem.detach(), options=options, name=name, is_plain=True), main
        known = {id(t) for t in main}
        others = tuple({id(t): t for t in _tensors(problem) if id(t) not in known}.values())
        call = cls(problem=problem, options=options, name=name, others=others)
        return call, (*main, *others)

    def on(self, bias: Tensor, slope: Tensor | None, *tensors: Tensor) -> Inclusion:
        """Return the problem on these tensors."""
        old = self.problem
        if not self.others:
            activation = old.activation if slope is None else LinearSlope(slope)
            return Inclusion(old.operator.rebuild(tensors), bias, activation)
        given = (*old.operator.tensors, *self.others)
        swap = {id(a): b for a, b in zip(given, tensors, strict=True)} | {id(old.bias): bias}
        if isinstance(old.activation, LinearSlope) and slope is not None:
            swap[id(old.activation.d)] = slope
        return _on(old, swap)

    def adjoint(self, operator: LinearOperator, cotangent: Tensor, slope: Tensor) -> Tensor:
        """Return u = D(Wᵀu + g), differentiable if the gradient is exact."""
        if torch._C._functorch.is_legacy_batchedtensor(cotangent):
            return _batched(lambda g: self.adjoint(operator, g, slope.expand_as(g)), cotangent)
        problem = Inclusion(operator.T, cotangent, LinearSlope(slope))
        gradient = self.options.gradient
        if gradient.exact:
            return gradient.adjoint(problem, self.solve_adjoint)
        call, tensors = _Call.of(problem, self.options, self.name)
        call.found.extend(self.found)
        return _Biased.apply(call, None, *tensors)  # type: ignore[no-untyped-call]

    def solve_adjoint(self, problem: Inclusion, method: Method | None, tol: float | None) -> Tensor:
        method = self.options.method if method is None else method
        if isinstance(method, Auto):
            steps = self.found[-1].stats.steps
            mean = float(steps.double().mean()) if steps.numel() else 0.0
            method = method.adjoint(mean, problem)
        options = dataclasses.replace(
            self.options, method=method, tol=self.options.tol if tol is None else tol
        )
        return _equilibrium(problem, None, options, "adjoint solve").value


class _Equilibrium(torch.autograd.Function):
    """From a problem to z, its residual and the steps taken, with the implicit gradient of z.

    The tensors of W travel as saved tensors, so that autograd sees them and notices when one is
    changed in place.
    """

    @staticmethod
    def forward(call: _Call, z0: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        o = call.options
        # Where the call is plain these tensors are those of its problem, less their graph.
        problem = call.problem if call.is_plain else call.on(*tensors)
        solution = solve(
            problem, o.method, tol=o.tol, max_steps=o.max_steps, z0=z0,
            on_failure=o.on_failure, require_monotone=o.require_monotone, name=call.name,
        )  # fmt: skip
        call.found.append(solution)
        return solution.value.clone(), solution.residual, solution.stats.steps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, _, bias, slope, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], None if slope is None else bias, slope, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(g):
            return _Equilibrium._backward(ctx, *map(_living, (g, *ctx.saved_tensors)))

    @staticmethod
    def _backward(
        ctx: Any, g: Tensor, z: Tensor, bias: Tensor, slope: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Outside of a transform saved tensors share their memory with those of the call, so values
        # that are compared here are compared for all of the backward pass.
        given = ctx.call.problem.operator
        with contextlib.nullcontext() if ctx.call.others else given.settled():
            problem = ctx.call.on(z if bias is None else bias, slope, *tensors)
            operator = problem.operator
            u = ctx.call.adjoint(operator, g, problem.activation.slope(z))
        slope_grad = None
        if bias is not None and ctx.needs_input_grad[3]:
            # z = d ⊙ (Wz + v): ∂ℓ/∂d = (Wᵀu + g) ⊙ (Wz + v)
            slope_grad = operator.T.affine(u, g) * operator.affine(z, bias)
        pullback: tuple[Tensor | None, ...] = (None,) * len(operator.tensors)
        if any(ctx.needs_input_grad[4:]):
            pullback = operator.pullback(u, z)
        return (None, None, u, slope_grad, *pullback, *(None for _ in ctx.call.others))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "an equilibrium has no forward-mode derivatives (jvp, jacfwd, hessian): take reverse "
            "mode, torch.func.vjp or jacrev, and jacrev of jacrev for a Hessian"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor | None) -> Any:
        return _over_members(_Equilibrium, info.batch_size, in_dims[1:], call, tensors), (0, 0, 0)


# torch asks for the signature at every call, and finding it out takes as long as three products.
setattr(_Equilibrium.forward, "__signature__", inspect.signature(_Equilibrium.forward))  # noqa: B010


class _Biased(torch.autograd.Function):
    """The adjoint that a biased gradient stops at, which has no derivative."""

    @staticmethod
    def forward(call: _Call, z0: None, *tensors: Any) -> Tensor:
        return call.options.gradient.adjoint(call.on(*tensors), call.solve_adjoint).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"{ctx.call.options.gradient!r} is not the gradient of a function and has no "
            "derivative: use ImplicitGradient() for second derivatives"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor | None) -> Any:
        return _over_members(_Biased, info.batch_size, in_dims[1:], call, tensors), 0


def _over_members(
    function: Any, size: int, dims: Any, call: _Call, tensors: tuple[Tensor | None, ...]
) -> Any:
    """Return what the function returns for every member of a mapped dimension, stacked in front.

    Args:
        dims: of each tensor the mapped dimension, or None.
        tensors: z0, v, the slopes and those of W, as `_Call.of` gives them.
    """
    samples = 3
    if all(d is None for d in dims[samples:]):
        front = [
            t if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors[:samples], dims[:samples], strict=True)
        ]
        return function.apply(call, *front, *tensors[samples:])
    members = [
        function.apply(call, *(
            t if t is None or d is None else t.select(d, i)
            for t, d in zip(tensors, dims, strict=True)
        ))
        for i in range(size)
    ]  # fmt: skip
    if isinstance(members[0], Tensor):
        return torch.stack(members)
    return tuple(map(torch.stack, zip(*members, strict=True)))


def _batched(function: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    """Return the function of cotangents that autograd has batched, one batch dimension in front.

    `is_grads_batched` and `vectorize` hide the batch in a tensor of their own, for which an
    autograd function has no rule.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    result = function(torch._remove_batch_dim(g, level, 1, 0))
    return torch._add_batch_dim(result, 0, level)


def _living(tensor: Any) -> Any:
    """Return the tensor within one whose function transform has ended (jacrev in chunks of 1)."""
    return torch._C._functorch.unwrap_if_dead(tensor) if isinstance(tensor, Tensor) else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a dataclass, and in the dataclasses that it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for name in _contents(value):
            yield from _tensors(getattr(value, name))
    elif isinstance(value, LinearOperator):
        raise TypeError(
            "within a function transform an operator must be a dataclass of its tensors, "
            f"got a {type(value).__name__}: make it one, or take the transform apart"
        )


def _on(value: Any, swap: dict[int, Tensor]) -> Any:
    """Return the same thing with its tensors, by identity, swapped for others."""
    if isinstance(value, Tensor):
        return swap[id(value)]
    if isinstance(value, Mapping):
        return {key: _on(part, swap) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_on(part, swap) for part in value)
    if dataclasses.is_dataclass(value):
        parts = {name: _on(getattr(value, name), swap) for name in _contents(value)}
        kind: Any = type(value)
        return kind(**parts)
    return value


def _contents(value: Any) -> Iterator[str]:
    """Yield what a dataclass is built from, without what it has cached."""
    return (f.name for f in dataclasses.fields(value) if f.init and f.name != "_memo")
