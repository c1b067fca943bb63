"""How is z = σ(Wz + v) solved for every sample?

`solve` checks the problem, runs a method, lets samples that float32 cannot finish go on in float64,
tries `Auto`'s fallbacks on samples that are still missing, and reports the evidence.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from solvers.inclusion import Inclusion
from solvers.methods import Auto, Method, Outcome, Request, check_method
from solvers.operators import NotMonotoneError
from solvers.operators.base import check_tensors
from solvers.precision import use_full_precision
from solvers.solution import OnFailure, Solution, Stats, Status, check_options


def solve(
    problem: Inclusion,
    method: Method | None = None,
    *,
    tol: float = 1e-4,
    max_steps: int = 5000,
    z0: Float[Tensor, "*batch n"] | None = None,
    on_failure: OnFailure = "warn",
    require_monotone: bool = True,
    name: str = "solve",
) -> Solution:
    """Solve z = σ(Wz + v) for every sample of the problem, without building a graph.

    With z̃ = σ(Wz + v), a sample is done at the first check at which its relative residual
    ‖z̃ − z‖_Λ / max(‖z̃‖_Λ, ‖z‖_Λ) is at most `tol`, and the z of that check is returned. A sample
    that stalls at the rounding of float32 goes on in float64 from where it is. The result is
    rounded to float32, and its residual is that of the rounded z, evaluated in float64.

    `Status.CONVERGED` says that the residual is at most tol for every sample. Then the exact z̃ of
    the problem as stored satisfies

        ‖z̃ − z‖_Λ ≤ tol·max(‖z̃‖_Λ, ‖z‖_Λ) + ρ,

    where ρ bounds the rounding of z̃ and of the norms in the dtype of the problem; `acceptance`
    gives ρ as a function of ‖z‖_Λ and ‖v‖_Λ alone. If a sample stays above tol and rounding
    explains the whole excess, the status is `Status.ROUNDING`, a failure like any other.

    Args:
        problem: the inclusion; gradients do not flow (use `equilibrium` for that).
        method: how to solve; `Auto()` when omitted.
        tol: relative tolerance in the Λ norm, for every sample.
        max_steps: limit of iterations, in each precision and of each method that `Auto` tries.
        z0: warm start, of the shape of the bias; a cold start when omitted.
        on_failure: what to do if a sample misses its tolerance: "warn" or "raise".
        require_monotone: whether to refuse weights with m ≤ 0, whose equilibrium need not exist or
            be unique.
        name: what messages call this solve.

    Returns:
        z of the shape of the bias with its residual per sample, status and cost.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if shapes or dtypes of the problem disagree, the metric is not positive, tol is
            below what the dtype can hold, max_steps < 1, on_failure is unknown, z0 has another
            shape or dtype or is not finite, or a step-size rule or method refuses the problem.
        NonFiniteError: if the bias or the weights contain NaN or Inf.
        NotMonotoneError: if m ≤ 0 and `require_monotone`.
        SolveError: if a sample misses its tolerance and `on_failure` is "raise".

    Warns:
        SolveWarning: if a sample misses its tolerance and `on_failure` is "warn".

    Example:
        >>> from solvers import DenseOperator, PeacemanRachford, ReLU
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solution = solve(Inclusion(DenseOperator(W), v, ReLU()), PeacemanRachford(), tol=1e-6)
        >>> solution.value
        tensor([[0.4000, 1.2000]])
        >>> solution.status
        <Status.CONVERGED: 'reached its tolerance'>
    """
    method = Auto() if method is None else method
    if not isinstance(problem, Inclusion):
        raise TypeError(f"problem must be an Inclusion, got {type(problem).__name__}")
    check_method(method)
    tol, max_steps = check_options(tol, max_steps, on_failure)
    _check_precision(problem, tol, z0)
    full = use_full_precision(problem.bias, convolutions=problem.operator.by_kernels)
    with torch.no_grad(), full, problem.operator.settled():
        _check_metric(problem)
        if require_monotone:
            _check_monotone(problem)
        shape = problem.bias.shape
        flat = problem.detach().flatten()
        start = None if z0 is None else z0.detach().reshape(flat.bias.shape)
        if start is not None:
            # Where v = 0 the solution is 0 (if σ(0) = 0). Steps from elsewhere never come near it
            # in relative terms; a cold start begins there.
            start = torch.where((flat.bias != 0).any(-1, keepdim=True), start, 0.0)
        request = Request(tol=_round_down(tol, flat.bias.dtype), max_steps=max_steps, z0=start)
        outcome, status, used = _run(flat, method, request)
        method = used[-1]
        if status is Status.DIVERGED:
            problem.check_finite()
        value = outcome.value
        solution = Solution(
            value=_reshape(value, shape),
            status=status,
            stats=Stats(
                steps=_reshape(outcome.steps, shape[:-1]),
                checks=outcome.checks,
                loop=outcome.loop,
                fallback=outcome.fallback,
            ),
            residual=_reshape(outcome.residual, shape[:-1]).to(value.dtype),
            tol=tol,
            _methods=used,
            name=name,
            likely_causes=partial(method.likely_causes, flat),
            _error_bound=partial(_error_bound, flat, value, shape[:-1]),
        )
    return solution.report(on_failure)


def _reshape(t: Tensor, shape: torch.Size) -> Tensor:
    return t if t.shape == shape else t.reshape(shape)


def _error_bound(problem: Inclusion, value: Tensor, batch: torch.Size) -> Tensor:
    return problem.error_bound(value).reshape(batch)


def _check_precision(problem: Inclusion, tol: float, z0: Tensor | None) -> None:
    dtype = problem.bias.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"problems are float32 or float64, got {dtype}")
    smallest = 4 * torch.finfo(dtype).eps
    if not tol >= smallest:
        raise ValueError(
            f"tol = {tol:g} is below what {dtype} can hold ({smallest:.1e}): "
            "use a larger tolerance or float64"
        )
    if z0 is not None:
        check_tensors(z0=z0)
        if z0.shape != problem.bias.shape or z0.dtype != dtype or z0.device != problem.bias.device:
            raise ValueError(
                f"z0 must have shape {tuple(problem.bias.shape)} and dtype {dtype} on "
                f"{problem.bias.device}, got {tuple(z0.shape)} and {z0.dtype} on {z0.device}"
            )
        if not bool(torch.isfinite(z0).all()):
            raise ValueError("z0 contains NaN or Inf")


@lru_cache
def _round_down(tol: float, dtype: torch.dtype) -> float:
    """Return the largest number of the dtype that is at most tol.

    Comparisons with tensors of that dtype would round tol to nearest, which may be upwards.
    """
    if dtype == torch.float64:
        return tol
    rounded = np.float32(tol)
    return float(rounded if float(rounded) <= tol else np.nextafter(rounded, np.float32(0)))


def _check_metric(problem: Inclusion) -> None:
    metric = problem.operator.metric
    if not problem.operator.memo("metric is positive", lambda: bool((metric > 0).all())):
        raise ValueError(f"the metric must be positive, got {float(metric.min()):.3g}")


def _check_monotone(problem: Inclusion) -> None:
    operator = problem.operator
    if operator.is_monotone():
        return
    problem.check_finite()
    raise NotMonotoneError(
        f"I − W is not strongly monotone in the Λ norm: m = {operator.constants().m:.3g} ≤ 0, so "
        "the equilibrium need not exist or be unique. Check the weights with the layer's "
        "certificate(), or pass require_monotone=False to try all the same"
    )


def _run(
    problem: Inclusion, asked: Method, request: Request
) -> tuple[Outcome, Status, tuple[Method, ...]]:
    """Run the chosen method, then its fallbacks on the samples that it missed.

    Returns:
        The outcome, its status, and the methods that ran, in their order.
    """
    used: tuple[Method, ...] = (asked.choose(problem),)
    outcome = used[0].run(problem, request)
    if (status := outcome.status(request)) is Status.CONVERGED:
        return outcome, status, used
    outcome = _continue_unfinished(problem, used[0], request, outcome)
    for method in asked.fallbacks(problem, request):
        index = (~(outcome.residual <= request.tol)).nonzero().squeeze(-1)
        if index.numel() == 0:
            break
        part, before = problem.select(index), outcome.select(index)
        start = torch.where(before.residual.isfinite()[:, None], before.value, 0.0)
        again = dataclasses.replace(request, z0=start)
        found = _continue_unfinished(part, method, again, method.run(part, again))
        outcome, used = outcome.continue_samples(index, found.take_better(before)), (*used, method)
    return outcome, outcome.status(request), used


def _continue_unfinished(
    problem: Inclusion, method: Method, request: Request, outcome: Outcome
) -> Outcome:
    """Continue in float64 where float32 stalled, and mark the samples that rounding limits."""
    above = ~(outcome.residual <= request.tol)
    # Where σ(v) = 0 the solution is 0. An iteration that rounds may never come near it in relative
    # terms.
    zero = above & (problem.activation(problem.bias) == 0).all(-1)
    outcome = dataclasses.replace(
        outcome,
        value=torch.where(zero[:, None], 0.0, outcome.value),
        residual=torch.where(zero, 0.0, outcome.residual),
        worst=None,
    )
    unfinished = outcome.find_unfinished(request)
    if not bool(unfinished.any()) or not bool(outcome.residual.isfinite().all()):
        return outcome
    index = unfinished.nonzero().squeeze(-1)
    part = problem.select(index)
    if problem.bias.dtype == torch.float32:
        found = _continue_in_double(part, method, request, outcome.value[index])
        outcome = outcome.continue_samples(index, found)
        assert found.rounding_limited is not None
        limited = found.rounding_limited
    else:
        limited = part.is_rounding_limited(outcome.value[index], request.tol)
    rounding_limited = torch.zeros_like(unfinished)
    rounding_limited[index] = limited
    return dataclasses.replace(outcome, rounding_limited=rounding_limited)


def _continue_in_double(problem: Inclusion, method: Method, request: Request, z: Tensor) -> Outcome:
    """Continue from z in float64, round back, and evaluate the residual of that in float64."""
    double = problem.to(torch.float64)
    # Rounding back moves the residual by about L eps of float32, so most of tol is left for it.
    left = Request(tol=request.tol / 8, max_steps=request.max_steps, z0=z.double())
    better = method.run(double, left)
    value = better.value.float()
    residual = double.relative_residual(value.double())
    # If float64 reached its tolerance, or its own rounding, then float32 is what limits z.
    there = (better.residual <= left.tol) | double.is_rounding_limited(better.value, left.tol)
    return dataclasses.replace(
        better,
        value=value,
        residual=residual,
        rounding_limited=there & (residual > request.tol),
        worst=None,
    )
