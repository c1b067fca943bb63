"""How is z = σ(Wz + v) solved for every sample, and what is refused or repeated on the way?"""

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
from solvers.precision import full_precision
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

    Samples whose relative residual ‖z̃ − z‖_Λ / max(‖z̃‖_Λ, ‖z‖_Λ), z̃ = σ(Wz + v), is at most
    `tol` at a check are done and keep the z of that check. Samples that stall at the rounding of
    float32 go on in float64 from where they are; what is returned is rounded to float32, and its
    residual is that of the rounded z, evaluated in float64.

    The residual is reported as it is, and `Status.CONVERGED` says that it is at most tol for every
    sample. Then, evaluated exactly on the problem as stored,

        ‖z̃ − z‖_Λ ≤ tol·max(‖z̃‖_Λ, ‖z‖_Λ) + ρ,

    where ρ bounds the rounding of z̃ and of the norms in the dtype of the problem: `acceptance`
    gives it as a function of ‖z‖_Λ and ‖v‖_Λ alone. Where some sample stays above tol and rounding
    explains all that is left, the status is `Status.ROUNDING`, which warns or raises as any failure
    does.

    Args:
        problem: the inclusion; gradients do not flow (use `equilibrium` for that).
        method: how to solve; `Auto()` when omitted.
        tol: relative tolerance in the Λ norm, per sample.
        max_steps: limit of iterations, in each precision and of each method that `Auto` tries.
        z0: warm start, of the shape of the bias.
        on_failure: what to do when a sample misses its tolerance: "warn" or "raise".
        require_monotone: refuse weights with m ≤ 0, whose equilibrium need not exist or be unique.
        name: what messages call this solve.

    Returns:
        The solution with its evidence.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if shapes or dtypes of the problem disagree, the metric is not positive, tol is
            below what the dtype can hold, max_steps < 1, on_failure is unknown, z0 has another
            shape or dtype or is not finite, or a step-size rule or method refuses the problem.
        NonFiniteError: if the bias or the weights contain NaN or Inf.
        NotMonotoneError: if m ≤ 0 and `require_monotone`.
        SolveError: on failure, when `on_failure` is "raise".
    """
    method = Auto() if method is None else method
    if not isinstance(problem, Inclusion):
        raise TypeError(f"problem must be an Inclusion, got {type(problem).__name__}")
    check_method(method)
    tol, max_steps = check_options(tol, max_steps, on_failure)
    _check_precision(problem, tol, z0)
    full = full_precision(problem.bias, convolutions=problem.operator.by_kernels)
    with torch.no_grad(), full, problem.operator.settled():
        _check_metric(problem)
        if require_monotone:
            _check_monotone(problem)
        shape = problem.bias.shape
        flat = problem.detach().flatten()
        start = None if z0 is None else z0.detach().reshape(flat.bias.shape)
        if start is not None:
            # Where v = 0 the solution is 0 (if σ(0) = 0): steps from elsewhere never come near it
            # in relative terms, a cold start is there.
            start = torch.where((flat.bias != 0).any(-1, keepdim=True), start, 0.0)
        request = Request(tol=_held(tol, flat.bias.dtype), max_steps=max_steps, z0=start)
        outcome, status, used = _run(flat, method, request)
        method = used[-1]
        if status is Status.DIVERGED:
            problem.check_finite()
        value = outcome.value
        solution = Solution(
            value=_shaped(value, shape),
            status=status,
            stats=Stats(
                steps=_shaped(outcome.steps, shape[:-1]),
                checks=outcome.checks,
                loop=outcome.loop,
                fallback=outcome.fallback,
            ),
            residual=_shaped(outcome.residual, shape[:-1]).to(value.dtype),
            tol=tol,
            _methods=used,
            name=name,
            likely_causes=partial(method.likely_causes, flat),
            _error_bound=partial(_error_bound, flat, value, shape[:-1]),
        )
    return solution.report(on_failure)


def _shaped(t: Tensor, shape: torch.Size) -> Tensor:
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
def _held(tol: float, dtype: torch.dtype) -> float:
    """Return the largest number of the dtype up to tol: comparisons of tensors round tol to it."""
    if dtype == torch.float64:
        return tol
    held = np.float32(tol)
    return float(held if float(held) <= tol else np.nextafter(held, np.float32(0)))


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
    """Run the method chosen and, on samples that it misses, its fallbacks; return all that ran."""
    used: tuple[Method, ...] = (asked.choose(problem),)
    outcome = used[0].run(problem, request)
    if (status := outcome.status(request)) is Status.CONVERGED:
        return outcome, status, used
    outcome = _continued(problem, used[0], request, outcome)
    for method in asked.fallbacks(problem, request):
        index = (~(outcome.residual <= request.tol)).nonzero().squeeze(-1)
        if index.numel() == 0:
            break
        part, before = problem.select(index), outcome.select(index)
        start = torch.where(before.residual.isfinite()[:, None], before.value, 0.0)
        again = dataclasses.replace(request, z0=start)
        found = _continued(part, method, again, method.run(part, again))
        outcome, used = outcome.continue_samples(index, found.better_than(before)), (*used, method)
    return outcome, outcome.status(request), used


def _continued(problem: Inclusion, method: Method, request: Request, outcome: Outcome) -> Outcome:
    """Go on in float64 where float32 stalled, and say where only rounding is left."""
    above = ~(outcome.residual <= request.tol)
    # Where σ(v) = 0 the solution is 0, which an iteration that rounds may never come near in
    # relative terms.
    zero = above & (problem.activation(problem.bias) == 0).all(-1)
    outcome = dataclasses.replace(
        outcome,
        value=torch.where(zero[:, None], 0.0, outcome.value),
        residual=torch.where(zero, 0.0, outcome.residual),
        worst=None,
    )
    unfinished = outcome.unfinished(request)
    if not bool(unfinished.any()) or not bool(outcome.residual.isfinite().all()):
        return outcome
    index = unfinished.nonzero().squeeze(-1)
    part = problem.select(index)
    if problem.bias.dtype == torch.float32:
        found = _continue_in_double(part, method, request, outcome.value[index])
        outcome = outcome.continue_samples(index, found)
        assert found.resting is not None
        rests = found.resting
    else:
        rests = part.rests(outcome.value[index], request.tol)
    resting = torch.zeros_like(unfinished)
    resting[index] = rests
    return dataclasses.replace(outcome, resting=resting)


def _continue_in_double(problem: Inclusion, method: Method, request: Request, z: Tensor) -> Outcome:
    """Go on from z in float64, and measure there what is left after rounding back."""
    double = problem.to(torch.float64)
    # Rounding back moves the residual by about L roundoffs of float32: most of tol is left to it.
    left = Request(tol=request.tol / 8, max_steps=request.max_steps, z0=z.double())
    better = method.run(double, left)
    value = better.value.float()
    residual = double.relative_residual(value.double())
    # Where float64 got there, or to its own rounding, it is float32 that keeps z away.
    there = (better.residual <= left.tol) | double.rests(better.value, left.tol)
    return dataclasses.replace(
        better,
        value=value,
        residual=residual,
        resting=there & (residual > request.tol),
        worst=None,
    )
