"""How does a gradient pass through an equilibrium without unrolling the solver?

With z = σ(Wz + v) and D = diag σ'(Wz + v), a cotangent g of z gives

    u = D(Wᵀu + g),      ∂ℓ/∂v = u,      ∂ℓ/∂W = u zᵀ,

and the equation for u is again a monotone inclusion (operator Wᵀ, bias g, "activation" u ↦ Du). So
the same `solve` with the same factor serves it. Because the adjoint is itself an equilibrium, so is
its derivative: gradients exist to any order.
Reference: Winston and Kolter (2020), Theorem 2.
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
from solvers.precision import use_full_precision
from solvers.solution import OnFailure, Solution
from solvers.solve import solve


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Hold the options of a solve, shared by forward and backward passes of every order."""

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

    With D = diag σ'(Wz + v), the backward pass solves u = D(Wᵀu + g) for the cotangent g of z, and
    returns ∂ℓ/∂v = u and ∂ℓ/∂W = u zᵀ. Memory does not grow with the number of iterations: only v,
    z and W are saved.

    The transforms grad, vjp and jacrev of torch.func may be taken of it, and vmap over samples and
    over weights; cotangents may be batched.
    Reference: Winston and Kolter (2020), Theorem 2.

    Args:
        problem: the inclusion, with its graph.
        method: how to solve; `Auto()` when omitted.
        tol: relative tolerance of the forward solve in the Λ norm and of the adjoint in the Λ⁻¹
            norm, for every sample.
        max_steps: limit of iterations, of each of the two.
        z0: warm start of the forward solve, of the shape of the bias.
        gradient: which gradient is passed back; `ImplicitGradient()` when omitted.
        on_failure: what to do if a sample misses its tolerance, forward or backward: "warn" or
            "raise".
        require_monotone: whether to refuse weights with m ≤ 0.
        name: what messages call the forward solve.

    Returns:
        The solution with its evidence, as from `solve`; `value` belongs to the graph. Within a
        function transform its `error_bound` raises RuntimeError.

    Raises:
        TypeError, ValueError, NonFiniteError, NotMonotoneError, SolveError: as `solve` does.
        NotImplementedError: on a second derivative, if the gradient is not exact.
        RuntimeError: on a forward-mode derivative.

    Example:
        >>> from solvers import DenseOperator, ReLU
        >>> W = torch.tensor([[0.0, -0.5], [0.5, 0.0]], requires_grad=True)
        >>> v = torch.ones(1, 2, requires_grad=True)
        >>> z = equilibrium(Inclusion(DenseOperator(W), v, ReLU()), tol=1e-6).value
        >>> z.sum().backward()
        >>> v.grad  # u
        tensor([[1.2000, 0.4000]])
        >>> W.grad  # u zᵀ
        tensor([[0.4800, 1.4400],
                [0.1600, 0.4800]])
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
        call, tensors = _Call.separate(problem, options, name)
        value, residual, steps = _Equilibrium.apply(  # type: ignore[no-untyped-call]
            call, z0, *tensors
        )
    found = next((s for s in call.solutions if not s.converged), call.solutions[-1])
    if not call.other_tensors:
        return dataclasses.replace(found, value=value)
    return dataclasses.replace(
        found, value=value, residual=residual, _error_bound=_refuse_error_bound,
        stats=dataclasses.replace(found.stats, steps=steps),
    )  # fmt: skip


def _refuse_error_bound() -> Tensor:
    raise RuntimeError(
        "error_bound is evaluated for plain tensors, not for those of a function transform or a "
        "trace: call equilibrium() or solve() outside of it"
    )


# Note [One function, from problem to state]
# Methods, checks and loops look at numbers, and tensors of a function transform do not show theirs.
# So the whole solve is one autograd function, to which torch.func hands tensors with numbers, level
# by level. For that every tensor of the problem must be an argument within a transform, also Λ and
# masks (`_Call.other_tensors`). Mapped samples are solved as one batch, mapped weights one after
# the other. Outside of transforms the operator travels as an object, with its cached factors.
@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """Separate a problem from its tensors, which autograd has to see.

    Attributes:
        problem: the problem, with the tensors of the time of the call.
        other_tensors: within a transform, those of its tensors that get no gradient; else none.
        is_plain: whether the call is outside of transforms, traces and captures.
        solutions: of its solves, in their order.
    """

    problem: Inclusion
    options: _Options
    name: str
    other_tensors: tuple[Tensor, ...] = ()
    is_plain: bool = False
    solutions: list[Solution] = field(default_factory=list)

    @classmethod
    def separate(
        cls, problem: Inclusion, options: _Options, name: str
    ) -> tuple[_Call, tuple[Tensor | None, ...]]:
        """Return the call and its tensors: v, the slopes of a `LinearSlope`, those of W, others."""
        activation = problem.activation
        slope = activation.d if isinstance(activation, LinearSlope) else None
        main = (problem.bias, slope, *problem.operator.tensors)
        if not must_not_cache():
            return cls(problem=problem.detach(), options=options, name=name, is_plain=True), main
        known = {id(t) for t in main}
        found = {id(t): t for t in _iterate_tensors(problem) if id(t) not in known}
        other_tensors = tuple(found.values())
        call = cls(problem=problem, options=options, name=name, other_tensors=other_tensors)
        return call, (*main, *other_tensors)

    def rebuild(self, bias: Tensor, slope: Tensor | None, *tensors: Tensor) -> Inclusion:
        """Return the problem with these tensors in place of its own."""
        old = self.problem
        if not self.other_tensors:
            activation = old.activation if slope is None else LinearSlope(slope)
            return Inclusion(old.operator.rebuild(tensors), bias, activation)
        given = (*old.operator.tensors, *self.other_tensors)
        swap = {id(a): b for a, b in zip(given, tensors, strict=True)} | {id(old.bias): bias}
        if isinstance(old.activation, LinearSlope) and slope is not None:
            swap[id(old.activation.d)] = slope
        return _swap_tensors(old, swap)

    def adjoint(self, operator: LinearOperator, cotangent: Tensor, slope: Tensor) -> Tensor:
        """Return u of u = D(Wᵀu + g), differentiable if the gradient is exact."""
        if torch._C._functorch.is_legacy_batchedtensor(cotangent):
            return _map_batched(lambda g: self.adjoint(operator, g, slope.expand_as(g)), cotangent)
        problem = Inclusion(operator.T, cotangent, LinearSlope(slope))
        gradient = self.options.gradient
        if gradient.is_exact:
            return gradient.adjoint(problem, self.solve_adjoint)
        call, tensors = _Call.separate(problem, self.options, self.name)
        call.solutions.extend(self.solutions)
        return _BiasedAdjoint.apply(call, None, *tensors)  # type: ignore[no-untyped-call]

    def solve_adjoint(self, problem: Inclusion, method: Method | None, tol: float | None) -> Tensor:
        method = self.options.method if method is None else method
        if isinstance(method, Auto):
            steps = self.solutions[-1].stats.steps
            mean = float(steps.double().mean()) if steps.numel() else 0.0
            method = method.choose_adjoint(mean, problem)
        options = dataclasses.replace(
            self.options, method=method, tol=self.options.tol if tol is None else tol
        )
        return _equilibrium(problem, None, options, "adjoint solve").value


class _Equilibrium(torch.autograd.Function):
    """Map a problem to z, its residual and its steps, with the implicit gradient of z.

    The tensors of W are saved tensors, so autograd notices if one is changed in place.
    """

    @staticmethod
    def forward(call: _Call, z0: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        o = call.options
        # In a plain call these tensors are those of its problem, cut from the graph.
        problem = call.problem if call.is_plain else call.rebuild(*tensors)
        solution = solve(
            problem, o.method, tol=o.tol, max_steps=o.max_steps, z0=z0,
            on_failure=o.on_failure, require_monotone=o.require_monotone, name=call.name,
        )  # fmt: skip
        call.solutions.append(solution)
        return solution.value.clone(), solution.residual, solution.stats.steps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, _, bias, slope, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], None if slope is None else bias, slope, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with use_full_precision(g):
            return _Equilibrium._backward(ctx, *map(_unwrap_dead, (g, *ctx.saved_tensors)))

    @staticmethod
    def _backward(
        ctx: Any, g: Tensor, z: Tensor, bias: Tensor | None, slope: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Outside of a transform saved tensors share their memory with those of the call, so one
        # comparison of values with the operator's memo serves the whole backward pass.
        given = ctx.call.problem.operator
        with contextlib.nullcontext() if ctx.call.other_tensors else given.settled():
            problem = ctx.call.rebuild(z if bias is None else bias, slope, *tensors)
            operator = problem.operator
            u = ctx.call.adjoint(operator, g, problem.activation.slope(z))
        slope_grad = None
        if bias is not None and ctx.needs_input_grad[3]:
            # z = d ⊙ (Wz + v): ∂ℓ/∂d = (Wᵀu + g) ⊙ (Wz + v)
            slope_grad = operator.T.affine(u, g) * operator.affine(z, bias)
        pullback: tuple[Tensor | None, ...] = (None,) * len(operator.tensors)
        if any(ctx.needs_input_grad[4:]):
            pullback = operator.pullback(u, z)
        return (None, None, u, slope_grad, *pullback, *(None for _ in ctx.call.other_tensors))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "an equilibrium has no forward-mode derivatives (jvp, jacfwd, hessian): take reverse "
            "mode, torch.func.vjp or jacrev, and jacrev of jacrev for a Hessian"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor | None) -> Any:
        return _map_members(_Equilibrium, info.batch_size, in_dims[1:], call, tensors), (0, 0, 0)


# torch asks for the signature at every call; to derive it takes as long as three products.
setattr(_Equilibrium.forward, "__signature__", inspect.signature(_Equilibrium.forward))  # noqa: B010


class _BiasedAdjoint(torch.autograd.Function):
    """Return the adjoint of a gradient that is not exact, whose derivative raises an error."""

    @staticmethod
    def forward(call: _Call, z0: None, *tensors: Any) -> Tensor:
        return call.options.gradient.adjoint(call.rebuild(*tensors), call.solve_adjoint).clone()

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
        return _map_members(_BiasedAdjoint, info.batch_size, in_dims[1:], call, tensors), 0


def _map_members(
    function: Any, size: int, dims: Any, call: _Call, tensors: tuple[Tensor | None, ...]
) -> Any:
    """Call a function for every index of a mapped dimension, and stack the results in front.

    Args:
        dims: the mapped dimension of each tensor, or None.
        tensors: z0 and what `_Call.separate` returns: v, the slopes, and those of W.
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


def _map_batched(function: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    """Call a function with cotangents that autograd has batched, one batch dimension in front.

    `is_grads_batched` and `vectorize` hide the batch in a type of tensor for which an autograd
    function has no rule.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    result = function(torch._remove_batch_dim(g, level, 1, 0))
    return torch._add_batch_dim(result, 0, level)


def _unwrap_dead(tensor: Any) -> Any:
    """Unwrap a tensor whose function transform has ended (jacrev in chunks of 1)."""
    return torch._C._functorch.unwrap_if_dead(tensor) if isinstance(tensor, Tensor) else tensor


def _iterate_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a dataclass and of the dataclasses in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _iterate_tensors(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _iterate_tensors(part)
    elif dataclasses.is_dataclass(value):
        for name in _field_names(value):
            yield from _iterate_tensors(getattr(value, name))
    elif isinstance(value, LinearOperator):
        raise TypeError(
            "within a function transform an operator must be a dataclass of its tensors, "
            f"got a {type(value).__name__}: make it one, or take the transform apart"
        )


def _swap_tensors(value: Any, swap: dict[int, Tensor]) -> Any:
    """Return a copy of a dataclass with its tensors, found by identity, replaced by others."""
    if isinstance(value, Tensor):
        return swap[id(value)]
    if isinstance(value, Mapping):
        return {key: _swap_tensors(part, swap) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_swap_tensors(part, swap) for part in value)
    if dataclasses.is_dataclass(value):
        parts = {name: _swap_tensors(getattr(value, name), swap) for name in _field_names(value)}
        kind: Any = type(value)
        return kind(**parts)
    return value


def _field_names(value: Any) -> Iterator[str]:
    """Yield the names of the fields that a dataclass is built from, without its cache."""
    return (f.name for f in dataclasses.fields(value) if f.init and f.name != "_memo")
