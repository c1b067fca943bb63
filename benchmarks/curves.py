"""What else does the solver benchmark show: convergence, cost over size, memory, gradients?"""

from __future__ import annotations

import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from typing import Any

import torch

from benchmarks.case import Case, quietly
from benchmarks.common import interleaved, ratio
from benchmarks.problems import Problem, random_problem, trained_problems
from solvers import (
    Anderson,
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Gradient,
    ImplicitGradient,
    Inclusion,
    JacobianFreeGradient,
    Method,
    NeuralODE,
    PeacemanRachford,
    PhantomGradient,
    SemismoothNewton,
    SolveWarning,
    TruncatedGradient,
    equilibrium,
    solve,
)  # fmt: skip
from solvers.torchdeq import TorchDEQ

METHODS: tuple[Method, ...] = (
    PeacemanRachford(),
    PeacemanRachford(compiled=False),
    DouglasRachford(),
    ForwardBackward(),
    Anderson(),
    Anderson(method=ForwardBackward()),
    SemismoothNewton(patience=20),
    NeuralODE(),
    TorchDEQ(solver="fixed_point_iter", step_size=0.1),
    TorchDEQ(solver="anderson", step_size=0.1),
    TorchDEQ(solver="broyden", step_size=0.1),
)
_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def convergence_curves(root: str, *, quick: bool) -> list[dict[str, Any]]:
    """Return residual and time over iterations of every method on three problems in float64.

    Each point is a solve of its own, stopped after so many steps: worst sample, median of 3 times.
    """
    problems: list[Problem] = [
        random_problem(80, 128, 1.0, 1.0),
        random_problem(80, 128, 0.1, 10.0),
        *(p for p in trained_problems(root, (128,)) if "γ=1 " in p.name),
    ]
    ladder = _LADDER[::3] if quick else _LADDER
    return [_curve(problem, method, ladder) for problem in problems for method in METHODS]


def _curve(problem: Problem, method: Method, ladder: tuple[int, ...]) -> dict[str, Any]:
    inclusion = problem.inclusion(torch.float64)
    steps: list[int] = []
    milliseconds: list[float] = []
    residual: list[float] = []
    for limit in ladder:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            solution = _attempt(inclusion, method, limit)
            times.append(1e3 * (time.perf_counter() - start))
        worst = float(solution.residual.max())
        if steps and solution.stats.max_steps <= steps[-1]:
            break
        if not math.isfinite(worst):
            break
        steps.append(solution.stats.max_steps)
        milliseconds.append(statistics.median(times))
        residual.append(max(worst, 1e-16))
        if solution.converged:
            break
    return {
        "problem": problem.name, "method": repr(method), "steps": steps,
        "milliseconds": milliseconds, "residual": residual,
    }  # fmt: skip


def _attempt(inclusion: Inclusion, method: Method, limit: int) -> Any:
    return quietly(partial(solve, inclusion, method, tol=1e-13, max_steps=limit))


def every_method(root: str, *, quick: bool) -> list[dict[str, Any]]:
    """Return a cell per problem, tolerance and direction with the time of every method.

    Medians of 7; a method that misses its tolerance within 1000 steps is a failure.
    """
    problems = [
        random_problem(80, 128, 1.0, 1.0),
        random_problem(80, 128, 0.1, 10.0),
        *(p for p in trained_problems(root, (128,)) if "γ=1 " in p.name),
    ]
    tolerances = [
        (torch.float32, 1e-3), (torch.float32, 1e-5), (torch.float64, 1e-8), (torch.float64, 1e-10),
    ]  # fmt: skip
    if quick:
        problems, tolerances = problems[:1], tolerances[:1]
    return [
        _cell_of_every_method(Case(problem, dtype, tol), direction)
        for problem in problems
        for dtype, tol in tolerances
        for direction in ("forward", "adjoint")
    ]


def _cell_of_every_method(case: Case, direction: str) -> dict[str, Any]:
    inclusion = case.forward if direction == "forward" else case.adjoint
    results = []
    calls = {}
    for method in METHODS:
        call = partial(
            solve, inclusion, method, tol=case.tol, max_steps=1000, require_monotone=False
        )
        solution = quietly(call)
        results.append({
            "method": repr(method), "seconds": None, "steps": solution.stats.max_steps,
            "status": solution.status.value, "residual": float(solution.residual.max()),
            "detail": solution.stats.loop,
        })  # fmt: skip
        if solution.converged:
            calls[repr(method)] = call
    times = interleaved(calls, 7, warmup=1)
    for result in results:
        if result["method"] in times:
            result["seconds"] = statistics.median(times[str(result["method"])])
    return case.cell(torch.get_num_threads(), f"every method, {direction}", None, results)


def scaling(*, quick: bool) -> dict[str, Any]:
    """Return the cost of 50 steps over n and over the batch, and the slopes of both in log–log."""
    sizes = (80, 160, 320, 640) if quick else (80, 125, 250, 500, 1000)
    batches = (64, 128, 256, 512) if quick else (64, 128, 256, 512, 1024, 2048)
    over_n = [_fifty_steps(n, 128) for n in sizes]
    over_batch = [_fifty_steps(250, batch) for batch in batches]
    points = [
        *({"n": n, "batch": 128, "seconds": s} for n, s in zip(sizes, over_n, strict=True)),
        *({"n": 250, "batch": b, "seconds": s} for b, s in zip(batches, over_batch, strict=True)),
    ]
    return {
        "points": points,
        "slope_n": _slope(sizes, over_n),
        "slope_batch": _slope(batches, over_batch),
    }


def _fifty_steps(n: int, batch: int) -> float:
    inclusion = random_problem(n, batch, 0.01, 100.0).inclusion(torch.float32)
    calls = {"": lambda: _attempt_single(inclusion)}
    return statistics.median(interleaved(calls, 9)[""])


def _attempt_single(inclusion: Inclusion) -> None:
    quietly(partial(solve, inclusion, PeacemanRachford(), tol=1e-6, max_steps=50))


def _slope(sizes: tuple[int, ...], seconds: list[float]) -> float:
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(s) for s in seconds]
    ).slope


def gradient_bias(root: str) -> list[dict[str, Any]]:
    """Return relative error and cosine of biased gradients of W against the exact one."""
    gradients: tuple[Gradient, ...] = (
        JacobianFreeGradient(),
        PhantomGradient(steps=5, damping=0.5),
        PhantomGradient(steps=20, damping=0.1),
        TruncatedGradient(steps=5),
        TruncatedGradient(steps=10),
    )
    rows = []
    for problem in trained_problems(root, (128,)):
        exact = _gradient_of_W(problem, ImplicitGradient())
        for gradient in gradients:
            other = _gradient_of_W(problem, gradient)
            rows.append({
                "layer": problem.name.split()[1], "gradient": repr(gradient),
                "error": float((other - exact).norm() / exact.norm()),
                "cosine": float((other * exact).sum() / (other.norm() * exact.norm())),
            })  # fmt: skip
    return rows


def _gradient_of_W(problem: Problem, gradient: Gradient) -> torch.Tensor:
    base = problem.inclusion(torch.float64)
    W = base.operator.tensors[0].clone().requires_grad_()
    inclusion = Inclusion(DenseOperator(W, base.metric), base.bias, base.activation)
    z = equilibrium(inclusion, tol=1e-10, gradient=gradient).value
    g = torch.Generator().manual_seed(1)
    z.backward(torch.randn(z.shape, generator=g, dtype=z.dtype))
    assert W.grad is not None
    return W.grad


def warm_starts(root: str) -> list[dict[str, Any]]:
    """Return what starting from the last solution saves when the bias has moved a little.

    Biases move by a random direction of the given size relative to their own, as images do from
    one attack step to the next; tolerance 1e-5 in float32, batch 1024 and the hard random problem.
    """
    problems = [
        random_problem(400, 1024, 0.1, 10.0),
        *(p for p in trained_problems(root, (1024,)) if p.name.split()[1] in ("γ=0.2", "γ=1")),
    ]
    rows = []
    for problem in problems:
        inclusion = problem.inclusion(torch.float32)
        z0 = solve(inclusion, tol=1e-5, on_failure="raise").value
        g = torch.Generator().manual_seed(2)
        direction = torch.randn(z0.shape, generator=g)
        direction *= inclusion.bias.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
        for size in (1e-1, 1e-2, 1e-3):
            bias = inclusion.bias + size * direction
            moved = Inclusion(inclusion.operator, bias, inclusion.activation)
            calls = {
                "cold": partial(solve, moved, tol=1e-5),
                "warm": partial(solve, moved, tol=1e-5, z0=z0),
            }
            steps = {k: float(call().stats.steps.double().mean()) for k, call in calls.items()}
            rows.append({
                "problem": problem.name, "moved": size, "cold_steps": steps["cold"],
                "warm_steps": steps["warm"], "ratio": ratio(interleaved(calls, 9), "cold", "warm"),
            })  # fmt: skip
    return rows


def peak_memory() -> dict[str, float]:
    """Return the peak of memory, in MiB, that 10 and 1000 steps forward and backward add.

    Each is measured in a process of its own, above what the same process held before.
    """
    return {"short": _memory(10), "long": _memory(1000)}


def _memory(steps: int) -> float:
    code = f"from benchmarks.curves import use_memory; print(use_memory({steps}))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return float(output.split()[-1])


def use_memory(steps: int) -> float:
    """Solve forward and backward in so many steps each, and return the MiB that the peak rose."""
    warnings.simplefilter("ignore", SolveWarning)

    def run(limit: int) -> None:
        base = random_problem(250, 1024, 0.01, 100.0).inclusion(torch.float32)
        W = base.operator.tensors[0].requires_grad_()
        inclusion = Inclusion(DenseOperator(W, base.metric), base.bias, base.activation)
        method = PeacemanRachford()
        equilibrium(inclusion, method, tol=1e-6, max_steps=limit).value.sum().backward()

    run(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(steps)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
